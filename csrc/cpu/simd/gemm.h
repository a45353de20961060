// Products with a packed right matrix, for the few rows of a scan: C (M, N) = or += A (M, K) B. In
// bfloat16 both factors are rounded, B when it is packed; sums are float32.
#ifndef FASTDREAMER_CPU_SIMD_GEMM_H
#define FASTDREAMER_CPU_SIMD_GEMM_H

#include <stdlib.h>

#include "bfloat16.h"

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

// B (K, N) in panels of kPanel columns, each row after row, the last filled up with zeros; for
// products in bfloat16 see pack_pairs.
class Packed {
 public:
  Packed() = default;
  // B[k, n] = source[k * row_stride + n * column_stride], and one of the strides is 1. compute:
  // type of the factors; float32 where the instruction set has no products in bfloat16.
  Packed(
      const float* source, int64_t K, int64_t N, int64_t row_stride, int64_t column_stride,
      int32_t compute)
      : K_(K), N_(N), half_(kHasBfloat16 && compute == FD_BFLOAT16),
        data_(half_ ? round_up(N, kPairPanel) * pairs_of(K) : round_up(N, kPanel) * K) {
    if (half_) {
      pack_pairs(
          source, K, N, row_stride, column_stride, reinterpret_cast<int32_t*>(data_.get()));
      return;
    }
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
  bool half() const { return half_; }
  const float* panel(int64_t first_column) const { return data_.get() + first_column * K_; }
  const int32_t* pairs(int64_t first_column) const {
    return reinterpret_cast<const int32_t*>(data_.get()) + first_column * pairs_of(K_);
  }

 private:
  int64_t K_ = 0, N_ = 0;
  bool half_ = false;
  Buffer data_;
};

static inline Vec load_factors(const float* p) { return load(p); }
static inline Vec broadcast_factor(float x) { return broadcast(x); }
static inline Vec multiply_add(Vec sum, Vec a, Vec b) { return sum + a * b; }

// Factor: float, or int32_t for pairs in bfloat16, of which K is then the number.
template <int rows, typename Factor>
static inline void tile(
    int64_t K, const Factor* A, int64_t lda, const Factor* B, float* C, int64_t ldc,
    int64_t columns, bool add) {
  Vec left[rows], right[rows];
  for (int m = 0; m < rows; ++m) left[m] = right[m] = Vec{};
  for (int64_t k = 0; k < K; ++k) {
    const auto b0 = load_factors(B + k * kPanel), b1 = load_factors(B + k * kPanel + kLanes);
    for (int m = 0; m < rows; ++m) {
      const auto a = broadcast_factor(A[m * lda + k]);
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

template <int rows, typename Factor>
static inline void tail(
    int64_t M, int64_t K, const Factor* A, int64_t lda, const Factor* B, float* C, int64_t ldc,
    int64_t columns, bool add) {
  if constexpr (rows > 0) {
    if (M == rows) tile<rows>(K, A, lda, B, C, ldc, columns, add);
    else tail<rows - 1>(M, K, A, lda, B, C, ldc, columns, add);
  }
}

// `columns` of a panel, for all rows. Inlined, because a call costs small layers 4 %.
template <typename Factor>
__attribute__((always_inline)) static inline void multiply_panel(
    int64_t M, int64_t K, const Factor* A, int64_t lda, const Factor* B, float* C, int64_t ldc,
    int64_t columns, bool add) {
  int64_t m = 0;
  for (; m + kTile <= M; m += kTile)
    tile<kTile>(K, A + m * lda, lda, B, C + m * ldc, ldc, columns, add);
  tail<kTile - 1>(M - m, K, A + m * lda, lda, B, C + m * ldc, ldc, columns, add);
}

#ifdef FD_HAS_BFLOAT16
#ifndef FD_TILES
static inline void multiply_block(
    int64_t rows, int64_t pairs, const int32_t* A, const int32_t* B, float* C, int64_t ldc,
    int64_t columns, bool add) {
  multiply_panel(rows, pairs, A, kBlockStride, B, C, ldc, columns, add);
}
#endif

// In bfloat16, a block of the rows of A at a time. Not inlined: its block is large.
__attribute__((noinline)) inline void gemm_pairs(
    int64_t M, const float* A, int64_t lda, const Packed& B, float* C, int64_t ldc, bool add) {
  alignas(64) int32_t block[kBlockRows * kBlockStride];
  const int64_t total = pairs_of(B.K());
  for (int64_t m = 0; m < M; m += kBlockRows) {
    const int64_t rows = M - m < kBlockRows ? M - m : kBlockRows;
    for (int64_t k = 0; k < total; k += kBlockPairs) {
      const int64_t pairs = total - k < kBlockPairs ? total - k : kBlockPairs;
      const int64_t width = B.K() - 2 * k < 2 * pairs ? B.K() - 2 * k : 2 * pairs;
      for (int64_t i = 0; i < round_up(rows, kTileRows); ++i)
        round_row(A + (m + i) * lda + 2 * k, i < rows ? width : 0, block + i * kBlockStride, pairs);
      for (int64_t n = 0; n < B.N(); n += kPairPanel)
        multiply_block(
            rows, pairs, block, B.pairs(n) + k * kPairPanel, C + m * ldc + n, ldc,
            B.N() - n < kPairPanel ? B.N() - n : kPairPanel, add || k > 0);
    }
  }
}
#endif

static inline void gemm(
    int64_t M, const float* A, int64_t lda, const Packed& B, float* C, int64_t ldc,
    bool add = false) {
#ifdef FD_HAS_BFLOAT16
  if (B.half()) return gemm_pairs(M, A, lda, B, C, ldc, add);
#endif
  for (int64_t n = 0; n < B.N(); n += kPanel)
    multiply_panel(
        M, B.K(), A, lda, B.panel(n), C + n, ldc, B.N() - n < kPanel ? B.N() - n : kPanel, add);
}

}  // namespace FD_ISA
}  // namespace fastdreamer

#endif
