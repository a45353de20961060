// The factors of products: float, or two in bfloat16 where the instruction set has products in it.
// Two that follow one another along K lie in 32 bits, the first in the lower half, as vdpbf16ps and
// the tiles of AMX read both matrices.
#ifndef FASTDREAMER_CPU_SIMD_FACTORS_H
#define FASTDREAMER_CPU_SIMD_FACTORS_H

#include "half.h"
#include "rows.h"

#if defined(__AMX_BF16__) || defined(FD_AMX_EMULATED)
#define FD_PAIRS 1
#define FD_TILES 1
#include "amx.h"
#elif defined(__AVX512BF16__)
#define FD_PAIRS 1
#include <immintrin.h>
#endif

namespace fastdreamer {
namespace FD_ISA {

static inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

#ifndef FD_PAIRS

typedef float Factor;
typedef Vec FactorVec;
constexpr int64_t kPanel = 2 * kLanes;  // columns of a panel of B
constexpr int64_t kBlockRows = 64;      // that read large weights once

static inline int64_t factors_of(int64_t K) { return K; }
static inline Vec load_factors(const float* p) { return load(p); }
static inline Vec broadcast_factor(float x) { return broadcast(x); }
static inline Vec multiply_add(Vec sum, Vec a, Vec b) { return sum + a * b; }

static inline void pack_panel(
    const float* source, int64_t K, int64_t width, int64_t row_stride, int64_t column_stride,
    float* panel) {
  for (int64_t n = 0; n < kPanel; ++n) {
    const float* column = source + n * column_stride;
    for (int64_t k = 0; k < K; ++k)
      panel[k * kPanel + n] = n < width ? column[k * row_stride] : 0.0f;
  }
}

#else

typedef int32_t Factor;
typedef IntVec FactorVec;
constexpr int64_t kPanel = 32;
// Rows and pairs of a tile of the left matrix, and how many rows are rounded at a time.
#ifdef FD_TILES
constexpr int64_t kTileRows = 16, kTilePairs = 16, kBlockRows = 128;
#else
constexpr int64_t kTileRows = 1, kTilePairs = 1, kBlockRows = 64;
#endif
// Pairs that are rounded at a time, and those from row to row.
constexpr int64_t kBlockPairs = 256, kBlockStride = kBlockPairs + 16;

static inline int64_t factors_of(int64_t K) { return round_up((K + 1) / 2, kTilePairs); }

// Pairs of the elements of one row, filled up with zeros to `count` pairs.
static inline void round_row(const float* x, int64_t n, int32_t* pairs, int64_t count) {
  int64_t i = 0;
#ifdef __AVX512BF16__
  for (; i + 32 <= n; i += 32) {
    const __m512bh both = _mm512_cvtne2ps_pbh(load(x + i + 16), load(x + i));
    _mm512_storeu_si512(pairs + i / 2, reinterpret_cast<__m512i>(both));
  }
#endif
  for (; i < n; i += 2) {
    const UintVec two = rounded(load_part(x + i, n - i < 2 ? 1 : 2));
    pairs[i / 2] = static_cast<int32_t>(two[0] >> 16 | two[1]);
  }
  for (i = (n + 1) / 2; i < count; ++i) pairs[i] = 0;
}

// Pairs of the elements of two rows.
static inline void round_rows(const float* first, const float* second, int64_t n, int32_t* pairs) {
  by_vectors(n, [&](int64_t i, int c) {
    const UintVec low = rounded(load_some(first + i, c)) >> 16;
    const UintVec both = second ? low | rounded(load_some(second + i, c)) : low;
    store_some(reinterpret_cast<float*>(pairs + i), reinterpret_cast<Vec>(both), c);
  });
}

// As in float32, and rows are filled up to whole tiles; one of the strides is 1.
static inline void pack_panel(
    const float* source, int64_t K, int64_t width, int64_t row_stride, int64_t column_stride,
    int32_t* panel) {
  for (int64_t i = 0; i < factors_of(K) * kPanel; ++i) panel[i] = 0;
  if (row_stride != 1) {
    for (int64_t k = 0; k < K; k += 2) {
      const float* row = source + k * row_stride;
      round_rows(row, k + 1 < K ? row + row_stride : nullptr, width, panel + k / 2 * kPanel);
    }
    return;
  }
  int32_t column[kBlockPairs];
  for (int64_t n = 0; n < width; ++n)
    for (int64_t k = 0; k < K; k += 2 * kBlockPairs) {
      const int64_t left = K - k < 2 * kBlockPairs ? K - k : 2 * kBlockPairs;
      round_row(source + n * column_stride + k, left, column, 0);
      for (int64_t i = 0; 2 * i < left; ++i) panel[(k / 2 + i) * kPanel + n] = column[i];
    }
}

#ifdef FD_TILES
// 16 rows, or 32 with `two`, by 32 columns of C = or += products over `pairs` pairs.
template <bool two>
static inline void multiply_tiles(
    int64_t pairs, const int32_t* A, const int32_t* B, float* C, int64_t ldc, bool add_to) {
  __asm__ volatile("" ::: "memory");  // not every compiler knows that loads of tiles read memory
  float* below = C + kTileRows * ldc;
  if (add_to) {
    _tile_loadd(0, C, ldc * 4);
    _tile_loadd(1, C + 16, ldc * 4);
    if constexpr (two) {
      _tile_loadd(2, below, ldc * 4);
      _tile_loadd(3, below + 16, ldc * 4);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (two) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  for (int64_t k = 0; k < pairs; k += kTilePairs) {
    const int32_t* right = B + k * kPanel;
    _tile_loadd(4, A + k, kBlockStride * 4);
    _tile_loadd(6, right, kPanel * 4);
    _tile_loadd(7, right + 16, kPanel * 4);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (two) {
      _tile_loadd(5, A + kTileRows * kBlockStride + k, kBlockStride * 4);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, C, ldc * 4);
  _tile_stored(1, C + 16, ldc * 4);
  if constexpr (two) {
    _tile_stored(2, below, ldc * 4);
    _tile_stored(3, below + 16, ldc * 4);
  }
}

// The same for the first rows and columns of C alone.
template <bool two>
static inline void multiply_some(
    int64_t pairs, const int32_t* A, const int32_t* B, float* C, int64_t ldc, int64_t rows,
    int64_t columns, bool add_to) {
  alignas(64) float whole[2 * kTileRows * kPanel] = {};
  if (add_to)
    for (int64_t i = 0; i < rows; ++i) copy(C + i * ldc, whole + i * kPanel, columns);
  multiply_tiles<two>(pairs, A, B, whole, kPanel, true);
  for (int64_t i = 0; i < rows; ++i) copy(whole + i * kPanel, C + i * ldc, columns);
}

// `columns` of a panel for the rows of a block.
static inline void multiply_panel(
    int64_t rows, int64_t pairs, const int32_t* A, int64_t, const int32_t* B, float* C, int64_t ldc,
    int64_t columns, bool add_to) {
  int64_t m = 0;
  for (; m + 2 * kTileRows <= rows && columns == kPanel; m += 2 * kTileRows)
    multiply_tiles<true>(pairs, A + m * kBlockStride, B, C + m * ldc, ldc, add_to);
  for (; m < rows; m += 2 * kTileRows) {
    const int64_t left = rows - m;
    const int32_t* a = A + m * kBlockStride;
    float* c = C + m * ldc;
    if (left == kTileRows && columns == kPanel)
      multiply_tiles<false>(pairs, a, B, c, ldc, add_to);
    else if (left <= kTileRows)
      multiply_some<false>(pairs, a, B, c, ldc, left, columns, add_to);
    else
      multiply_some<true>(
          pairs, a, B, c, ldc, left < 2 * kTileRows ? left : 2 * kTileRows, columns, add_to);
  }
}
#else
static inline IntVec load_factors(const int32_t* p) { return load_bits(p); }
static inline IntVec broadcast_factor(int32_t pair) { return pair + IntVec{}; }
static inline Vec multiply_add(Vec sum, IntVec a, IntVec b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
#endif
#endif

// The tiles of the calling thread, from here to the end of its scope: products need them where they
// are computed by tiles.
class TileScope {
 public:
#ifdef FD_TILES
  TileScope() {
    static const TileConfig config = {
        1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    _tile_loadconfig(&config);
  }
  ~TileScope() { _tile_release(); }
#else
  TileScope() {}
  ~TileScope() {}
#endif
  TileScope(const TileScope&) = delete;
};

}  // namespace FD_ISA
}  // namespace fastdreamer

#endif
