// Products with a packed right matrix, for the few rows of a scan: C (M, N) = or += A (M, K) B.
#ifndef FASTDREAMER_CPU_SIMD_GEMM_H
#define FASTDREAMER_CPU_SIMD_GEMM_H

#include <stdlib.h>

#include "vec.h"

namespace fastdreamer {
namespace FD_ISA {

constexpr int kPanel = 2 * kLanes;                               // columns of a panel of B
constexpr int kTile = kLanes == 16 ? 12 : kLanes == 8 ? 6 : 4;  // rows of a tile of C

// Memory that is freed with its owner; std::vector would share its code between instruction sets.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count)
      : data_(static_cast<float*>(aligned_alloc(64, (count * 4 + 127) / 64 * 64))) {}
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

// B (K, N) in panels of kPanel columns, each row after row, the last filled up with zeros.
class Packed {
 public:
  Packed() = default;
  // B[k, n] = source[k * row_stride + n * column_stride].
  Packed(const float* source, int64_t K, int64_t N, int64_t row_stride, int64_t column_stride)
      : K_(K), N_(N), data_((N + kPanel - 1) / kPanel * kPanel * K) {
    for (int64_t p = 0; p < N; p += kPanel) {
      float* panel = data_.get() + p * K;
      const int64_t width = N - p < kPanel ? N - p : kPanel;
      for (int64_t n = 0; n < kPanel; ++n) {
        const float* column = source + (p + n) * column_stride;
        for (int64_t k = 0; k < K; ++k)
          panel[k * kPanel + n] = n < width ? column[k * row_stride] : 0.0f;
      }
    }
  }
  int64_t K() const { return K_; }
  int64_t N() const { return N_; }
  const float* panel(int64_t first_column) const { return data_.get() + first_column * K_; }

 private:
  int64_t K_ = 0, N_ = 0;
  Buffer data_;
};

template <int rows>
static inline void tile(
    int64_t K, const float* A, int64_t lda, const float* B, float* C, int64_t ldc, int64_t columns,
    bool add) {
  Vec left[rows], right[rows];
  for (int m = 0; m < rows; ++m) left[m] = right[m] = Vec{};
  for (int64_t k = 0; k < K; ++k) {
    const Vec b0 = load(B + k * kPanel), b1 = load(B + k * kPanel + kLanes);
    for (int m = 0; m < rows; ++m) {
      const Vec a = broadcast(A[m * lda + k]);
      left[m] += a * b0;
      right[m] += a * b1;
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
    int64_t M, int64_t K, const float* A, int64_t lda, const float* B, float* C, int64_t ldc,
    int64_t columns, bool add) {
  if constexpr (rows > 0) {
    if (M == rows) tile<rows>(K, A, lda, B, C, ldc, columns, add);
    else tail<rows - 1>(M, K, A, lda, B, C, ldc, columns, add);
  }
}

static inline void gemm(
    int64_t M, const float* A, int64_t lda, const Packed& B, float* C, int64_t ldc,
    bool add = false) {
  for (int64_t n = 0; n < B.N(); n += kPanel) {
    const int64_t columns = B.N() - n < kPanel ? B.N() - n : kPanel;
    int64_t m = 0;
    for (; m + kTile <= M; m += kTile)
      tile<kTile>(B.K(), A + m * lda, lda, B.panel(n), C + m * ldc + n, ldc, columns, add);
    tail<kTile - 1>(M - m, B.K(), A + m * lda, lda, B.panel(n), C + m * ldc + n, ldc, columns, add);
  }
}

}  // namespace FD_ISA
}  // namespace fastdreamer

#endif
