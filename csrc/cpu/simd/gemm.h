// Products with a packed right matrix, for the few rows of a scan: C (M, N) = or += A (M, K) B. The
// sets with products in bfloat16 round both factors to it, B when it is packed; sums are float32.
#ifndef FASTDREAMER_CPU_SIMD_GEMM_H
#define FASTDREAMER_CPU_SIMD_GEMM_H

#include <stdlib.h>

#include "factors.h"

namespace fastdreamer {
namespace FD_ISA {

constexpr int kTile = kLanes == 16 ? 12 : kLanes == 8 ? 6 : 4;  // rows of a tile of C

// Memory that is freed with its owner; std::vector would share its code between instruction sets.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count)
      : data_(static_cast<float*>(aligned_alloc(64, (count * 4 + 127) / 64 * 64))) {}
  Buffer(Buffer&& other) : data_(other.data_) { other.data_ = nullptr; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer& operator=(Buffer&& other) {
    float* data = data_;
    data_ = other.data_;
    other.data_ = data;
    return *this;
  }
  ~Buffer() { free(data_); }
  float* get() const { return data_; }

 private:
  float* data_ = nullptr;
};

// B (K, N) in panels of kPanel columns, each factor after factor along K, the last filled up with
// zeros.
class Packed {
 public:
  Packed() = default;
  // B[k, n] = source[k * row_stride + n * column_stride], and one of the strides is 1.
  Packed(const float* source, int64_t K, int64_t N, int64_t row_stride, int64_t column_stride)
      : K_(K), N_(N), data_(round_up(N, kPanel) * factors_of(K)) {
    for (int64_t p = 0; p < N; p += kPanel)
      pack_panel(
          source + p * column_stride, K, N - p < kPanel ? N - p : kPanel, row_stride,
          column_stride, reinterpret_cast<Factor*>(data_.get()) + p * factors_of(K));
  }
  int64_t K() const { return K_; }
  int64_t N() const { return N_; }
  const Factor* panel(int64_t first_column) const {
    return reinterpret_cast<const Factor*>(data_.get()) + first_column * factors_of(K_);
  }

 private:
  int64_t K_ = 0, N_ = 0;
  Buffer data_;
};

#ifndef FD_TILES
template <int rows>
static inline void tile(
    int64_t depth, const Factor* A, int64_t lda, const Factor* B, float* C, int64_t ldc,
    int64_t columns, bool add) {
  Vec left[rows], right[rows];
  for (int m = 0; m < rows; ++m) left[m] = right[m] = Vec{};
  for (int64_t k = 0; k < depth; ++k) {
    const FactorVec b0 = load_factors(B + k * kPanel), b1 = load_factors(B + k * kPanel + kLanes);
    for (int m = 0; m < rows; ++m) {
      const FactorVec a = broadcast_factor(A[m * lda + k]);
      left[m] = multiply_add(left[m], a, b0);
      right[m] = multiply_add(right[m], a, b1);
    }
  }
  for (int m = 0; m < rows; ++m) {
    float* c = C + m * ldc;
    if (columns == kPanel) {
      store(c, add ? load(c) + left[m] : left[m]);
      store(c + kLanes, add ? load(c + kLanes) + right[m] : right[m]);
      continue;
    }
    for (int64_t n = 0; n < columns; ++n) {
      const float value = n < kLanes ? left[m][n] : right[m][n - kLanes];
      c[n] = add ? c[n] + value : value;
    }
  }
}

template <int rows>
static inline void tail(
    int64_t M, int64_t depth, const Factor* A, int64_t lda, const Factor* B, float* C, int64_t ldc,
    int64_t columns, bool add) {
  if constexpr (rows > 0) {
    if (M == rows) tile<rows>(depth, A, lda, B, C, ldc, columns, add);
    else tail<rows - 1>(M, depth, A, lda, B, C, ldc, columns, add);
  }
}

// `columns` of a panel, for all rows.
static inline void multiply_panel(
    int64_t M, int64_t depth, const Factor* A, int64_t lda, const Factor* B, float* C, int64_t ldc,
    int64_t columns, bool add) {
  int64_t m = 0;
  for (; m + kTile <= M; m += kTile)
    tile<kTile>(depth, A + m * lda, lda, B, C + m * ldc, ldc, columns, add);
  tail<kTile - 1>(M - m, depth, A + m * lda, lda, B, C + m * ldc, ldc, columns, add);
}
#endif

#ifdef FD_PAIRS
// A block of the rows of A at a time.
static inline void gemm(
    int64_t M, const float* A, int64_t lda, const Packed& B, float* C, int64_t ldc,
    bool add = false) {
  alignas(64) Factor block[kBlockRows * kBlockStride];
  const int64_t total = factors_of(B.K());
  for (int64_t m = 0; m < M; m += kBlockRows) {
    const int64_t rows = M - m < kBlockRows ? M - m : kBlockRows;
    for (int64_t k = 0; k < total; k += kBlockPairs) {
      const int64_t pairs = total - k < kBlockPairs ? total - k : kBlockPairs;
      const int64_t width = B.K() - 2 * k < 2 * pairs ? B.K() - 2 * k : 2 * pairs;
      for (int64_t i = 0; i < round_up(rows, kTileRows); ++i)
        round_row(A + (m + i) * lda + 2 * k, i < rows ? width : 0, block + i * kBlockStride, pairs);
      for (int64_t n = 0; n < B.N(); n += kPanel)
        multiply_panel(
            rows, pairs, block, kBlockStride, B.panel(n) + k * kPanel, C + m * ldc + n, ldc,
            B.N() - n < kPanel ? B.N() - n : kPanel, add || k > 0);
    }
  }
}
#else

static inline void gemm(
    int64_t M, const float* A, int64_t lda, const Packed& B, float* C, int64_t ldc,
    bool add = false) {
  for (int64_t n = 0; n < B.N(); n += kPanel)
    multiply_panel(
        M, B.K(), A, lda, B.panel(n), C + n, ldc, B.N() - n < kPanel ? B.N() - n : kPanel, add);
}
#endif

}  // namespace FD_ISA
}  // namespace fastdreamer

#endif
