// Exchanges of elements between the lanes of vectors, and transposes by them.
#ifndef FASTDREAMER_CPU_SIMD_LANES_H
#define FASTDREAMER_CPU_SIMD_LANES_H

#include "vec.h"

namespace fastdreamer {
namespace FD_ISA {

// Exchanges the blocks of `step` elements that lie off the diagonal.
template <int step, int... lane>
static inline void swap_blocks(Vec& a, Vec& b, Lanes<lane...>) {
  const Vec low = shuffle(a, b, Lanes<((lane & step) ? kLanes + lane - step : lane)...>());
  b = shuffle(a, b, Lanes<((lane & step) ? kLanes + lane : lane + step)...>());
  a = low;
}

// Transposes the squares of `size` by `size`, a power of two, that lie side by side in `size`
// vectors.
template <int size, int step = 1>
static inline void transpose(Vec* v) {
  if constexpr (step < size) {
#pragma GCC unroll 16
    for (int i = 0; i < size; ++i)
      if (!(i & step)) swap_blocks<step>(v[i], v[i | step], AllLanes());
    transpose<size, 2 * step>(v);
  }
}

}  // namespace FD_ISA
}  // namespace fastdreamer

#endif
