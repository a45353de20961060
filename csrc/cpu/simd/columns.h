// kLanes contiguous narrow rows at once, a row to a lane: sums over a row need no shuffling, and
// no lane idles where rows are shorter than a vector.
#ifndef FASTDREAMER_CPU_SIMD_COLUMNS_H
#define FASTDREAMER_CPU_SIMD_COLUMNS_H

#include "lanes.h"

namespace fastdreamer {
namespace FD_ISA {

constexpr int64_t kNarrow = 128;  // the widest row that the functions below take

// Whether they are faster than row after row: the last vector of a wide row should be a whole one.
static inline bool by_columns(int64_t n) {
  return n <= 4 * kLanes || (n <= kNarrow && n % kLanes != 0);
}

// kLanes rows of n > 0 as n columns. `columns` has room for a multiple of kLanes.
static inline void load_columns(const float* x, int64_t n, Vec* columns) {
  float rows[kLanes * (kNarrow + 1)];
  for (int64_t i = 0; i < n; ++i) store(rows + i * kLanes, load(x + i * kLanes));
  store(rows + n * kLanes, Vec{});  // the last row is read past its end
  int64_t j = 0;
  do {
    for (int i = 0; i < kLanes; ++i) columns[j + i] = load(rows + i * n + j);
    transpose<kLanes>(columns + j);
    j += kLanes;
  } while (j < n);
}

static inline void store_columns(float* y, int64_t n, Vec* columns) {
  float rows[kLanes * (kNarrow + 1)];
  // From the last columns to the first: what runs over the end of a row is overwritten after it.
  for (int64_t j = (n - 1) / kLanes * kLanes; j >= 0; j -= kLanes) {
    transpose<kLanes>(columns + j);
    for (int i = 0; i < kLanes; ++i) store(rows + i * n + j, columns[j + i]);
  }
  for (int64_t i = 0; i < n; ++i) store(y + i * kLanes, load(rows + i * kLanes));
}

}  // namespace FD_ISA
}  // namespace fastdreamer

#endif
