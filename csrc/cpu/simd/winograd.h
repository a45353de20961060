// Minimal filtering (Winograd; for images Lavin and Gray, 2016): m outputs of a filter of R taps from
// T = m + R - 1 products, by Cook and Toom's polynomials at T - 1 points and at infinity.
#ifndef FASTDREAMER_CPU_SIMD_WINOGRAD_H
#define FASTDREAMER_CPU_SIMD_WINOGRAD_H

#include "gemm.h"

namespace fastdreamer {
namespace FD_ISA {

template <int rows, int columns>
struct Matrix {
  float at[rows][columns];
};

template <int rows, int columns>
constexpr Matrix<columns, rows> transposed(const Matrix<rows, columns>& A) {
  Matrix<columns, rows> B{};
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < columns; ++j) B.at[j][i] = A.at[i][j];
  return B;
}

// outputs = kOutputs ((kWeights weights) * (kSamples samples)), each along both axes of an image.
template <int m_, int R_>
struct Filtering {
  static constexpr int m = m_, R = R_, T = m + R - 1;
  // All but the last two for five and six products; with 2 and -2 in the place of 2 and -1/2 errors are twice as large.
  static constexpr double kPoints[] = {0, 1, -1, 2, -0.5, 0.5, -2};

  // The coefficients of the product of all (z - point) but the row's own.
  static constexpr Matrix<T, T> samples() {
    Matrix<T, T> B{};
    for (int i = 0; i < T; ++i) {
      double c[T + 1] = {1};
      for (int k = 0; k < T - 1; ++k) {
        if (k == i) continue;
        for (int j = T; j > 0; --j) c[j] = c[j - 1] - kPoints[k] * c[j];
        c[0] *= -kPoints[k];
      }
      for (int j = 0; j < T; ++j) B.at[i][j] = static_cast<float>(c[j]);
    }
    return B;
  }
  // Powers of the points, divided by the point's distances from all others where `scaled`.
  template <int n>
  static constexpr Matrix<T, n> powers(bool scaled) {
    Matrix<T, n> A{};
    for (int i = 0; i < T - 1; ++i) {
      double power = 1;
      for (int k = 0; scaled && k < T - 1; ++k)
        if (k != i) power /= kPoints[i] - kPoints[k];
      for (int j = 0; j < n; ++j, power *= kPoints[i]) A.at[i][j] = static_cast<float>(power);
    }
    A.at[T - 1][n - 1] = 1;
    return A;
  }
  static constexpr Matrix<T, T> kSamples = samples();
  static constexpr Matrix<T, R> kWeights = powers<R>(true);
  static constexpr Matrix<R, T> kWeightsBack = transposed(kWeights);
  static constexpr Matrix<T, m> kOutputsBack = powers<m>(false);
  static constexpr Matrix<m, T> kOutputs = transposed(kOutputsBack);
};

// Row i of L times `in`; what L multiplies by 0 is left out.
template <const auto& L, int columns>
static inline Vec row_times(int i, const Vec* in) {
  Vec sum{};
  bool some = false;
#pragma GCC unroll 8
  for (int j = 0; j < columns; ++j) {
    const float factor = L.at[i][j];
    if (factor == 0) continue;
    sum = some ? sum + in[j] * factor : in[j] * factor;
    some = true;
  }
  return sum;
}

// L in L^T: calls write(i, j, element) for its rows x rows, and read(i, j) for in's.
template <const auto& L, int rows, int columns, typename Read, typename Write>
static inline void multiply_both(const Read& read, const Write& write) {
  Vec half[rows][columns];
#pragma GCC unroll 8
  for (int j = 0; j < columns; ++j) {
    Vec in[columns];
#pragma GCC unroll 8
    for (int i = 0; i < columns; ++i) in[i] = read(i, j);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) half[i][j] = row_times<L, columns>(i, in);
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < rows; ++j) write(i, j, row_times<L, columns>(j, half[i]));
}

// Rows of a tile of `vectors` vectors of a product, as many as the registers hold.
constexpr int tile_rows(int vectors) { return vectors == 3 ? kTile * 2 / 3 : kTile; }
// Vectors of the next panel of a right matrix, where `left` are left: 2, and 3 of an odd number.
static inline int64_t panel_vectors(int64_t left) { return left % 2 == 0 ? 2 : left == 1 ? 1 : 3; }

// C (rows, vectors) = or += A B, A by columns where it is `turned`.
template <bool turned, int vectors, int rows>
static inline void product_tile(
    int64_t depth, const float* A, int64_t lda, const float* B, int64_t ldb, float* C, int64_t ldc,
    bool add) {
  Vec sums[rows][vectors];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) sums[i][j] = Vec{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec b[vectors];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) b[j] = load(B + k * ldb + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const Vec a = broadcast(turned ? A[k * lda + i] : A[i * lda + k]);
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) sums[i][j] += a * b[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      float* c = C + i * ldc + j * kLanes;
      store(c, add ? load(c) + sums[i][j] : sums[i][j]);
    }
}

template <bool turned, int vectors, int rows = tile_rows(vectors)>
static inline void product_panel(
    int64_t M, int64_t depth, const float* A, int64_t lda, const float* B, int64_t ldb, float* C,
    int64_t ldc, bool add) {
  if constexpr (rows > 0) {
    int64_t i = 0;
    for (; i + rows <= M; i += rows)
      product_tile<turned, vectors, rows>(
          depth, A + (turned ? i : i * lda), lda, B, ldb, C + i * ldc, ldc, add);
    product_panel<turned, vectors, rows - 1>(
        M - i, depth, A + (turned ? i : i * lda), lda, B, ldb, C + i * ldc, ldc, add);
  }
}

// C (M, N) = or += A (M, depth) B, N whole vectors. B lies in panels one after the other, each row
// after row; or, where A is turned and lies as (depth, M), row after row, ldb apart.
template <bool turned>
static inline void product(
    int64_t M, int64_t N, int64_t depth, const float* A, int64_t lda, const float* B, int64_t ldb,
    float* C, int64_t ldc, bool add) {
  for (int64_t n = 0; n < N;) {
    const int64_t vectors = panel_vectors((N - n) / kLanes), width = vectors * kLanes;
    const auto panel = vectors == 1   ? product_panel<turned, 1>
                       : vectors == 2 ? product_panel<turned, 2>
                                      : product_panel<turned, 3>;
    panel(M, depth, A, lda, turned ? B + n : B + n * depth, turned ? ldb : width, C + n, ldc, add);
    n += width;
  }
}

}  // namespace FD_ISA
}  // namespace fastdreamer

#endif
