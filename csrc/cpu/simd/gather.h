// The product of one-hot latents with a matrix: a sum of its rows.
#ifndef FASTDREAMER_CPU_SIMD_GATHER_H
#define FASTDREAMER_CPU_SIMD_GATHER_H

#include "vec.h"

namespace fastdreamer {
namespace FD_ISA {

// `held` vectors of a row, summed in registers.
template <int held>
static inline void gather_vectors(
    const float* table, const int32_t* index, int64_t S, int64_t K, int64_t O, float* y) {
  Vec total[held];
  for (int v = 0; v < held; ++v) total[v] = load(y + v * kLanes);
  for (int64_t s = 0; s < S; ++s) {
    if (index[s] < 0) continue;
    const float* row = table + (s * K + index[s]) * O;
    for (int v = 0; v < held; ++v) total[v] += load(row + v * kLanes);
  }
  for (int v = 0; v < held; ++v) store(y + v * kLanes, total[v]);
}

// y (O) += the rows of the table (S K, O) of each latent's class, of -1 none.
static inline void gather_row(
    const float* table, const int32_t* index, int64_t S, int64_t K, int64_t O, float* y) {
  constexpr int kHeld = 8;
  int64_t o = 0;
  for (; o + kHeld * kLanes <= O; o += kHeld * kLanes)
    gather_vectors<kHeld>(table + o, index, S, K, O, y + o);
  for (; o + kLanes <= O; o += kLanes) gather_vectors<1>(table + o, index, S, K, O, y + o);
  if (o == O) return;
  const int64_t left = O - o;
  Vec total = load_part(y + o, left);
  for (int64_t s = 0; s < S; ++s)
    if (index[s] >= 0) total += load_part(table + (s * K + index[s]) * O + o, left);
  store_part(y + o, total, left);
}

}  // namespace FD_ISA
}  // namespace fastdreamer

#endif
