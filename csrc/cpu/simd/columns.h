// kLanes contiguous narrow rows at once, a row to a lane: sums over a row need no shuffling, and
// no lane idles where rows are shorter than a vector.
#ifndef FASTDREAMER_CPU_SIMD_COLUMNS_H
#define FASTDREAMER_CPU_SIMD_COLUMNS_H

#include "lanes.h"

namespace fastdreamer {
namespace FD_ISA {

constexpr int kNarrow = 2 * kLanes;  // the functions below take rows of n < kNarrow

// Whether they are faster than row after row: in rows of less than two vectors, the last not whole.
static inline bool by_columns(int64_t n) { return n < kNarrow && n % kLanes != 0; }

// kLanes rows of n as n columns. `columns` has room for a multiple of kLanes.
static inline void load_columns(const float* x, int64_t n, Vec* columns) {
  by_vectors(n, [&](int64_t j, int c) {
    for (int i = 0; i < kLanes; ++i) columns[j + i] = load_some(x + i * n + j, c);
    transpose<kLanes>(columns + j);
  });
}

static inline void store_columns(float* y, int64_t n, Vec* columns) {
  by_vectors(n, [&](int64_t j, int c) {
    transpose<kLanes>(columns + j);
    for (int i = 0; i < kLanes; ++i) store_some(y + i * n + j, columns[j + i], c);
  });
}

}  // namespace FD_ISA
}  // namespace fastdreamer

#endif
