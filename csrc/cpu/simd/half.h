// bfloat16 in memory: the upper halves of floats.
#ifndef FASTDREAMER_CPU_SIMD_HALF_H
#define FASTDREAMER_CPU_SIMD_HALF_H

#include "vec.h"

namespace fastdreamer {
namespace FD_ISA {

typedef uint32_t UintVec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * kLanes)));
typedef uint16_t UnalignedHalfVec __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));

// The nearest bfloat16 in the upper half of each, an even one of two; NaN stays NaN.
static inline UintVec rounded(Vec x) {
  const UintVec b = reinterpret_cast<UintVec>(x);
  const UintVec nearest = b + 0x7fff + ((b >> 16) & 1), quiet = b | 0x00400000;
  return (x == x ? nearest : quiet) & 0xffff0000;
}

static inline void widen(const uint16_t* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const HalfVec halves = *reinterpret_cast<const UnalignedHalfVec*>(from + i);
    store(to + i, reinterpret_cast<Vec>(__builtin_convertvector(halves, UintVec) << 16));
  }
  UintVec rest{};
  for (int64_t j = 0; i + j < n; ++j) rest[j] = static_cast<uint32_t>(from[i + j]) << 16;
  if (i < n) store_part(to + i, reinterpret_cast<Vec>(rest), n - i);
}

static inline void narrow(const float* from, uint16_t* to, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    *reinterpret_cast<UnalignedHalfVec*>(to + i) =
        __builtin_convertvector(rounded(load(from + i)) >> 16, HalfVec);
  if (i == n) return;
  const UintVec rest = rounded(load_part(from + i, n - i));
  for (int64_t j = 0; i + j < n; ++j) to[i + j] = static_cast<uint16_t>(rest[j] >> 16);
}

}  // namespace FD_ISA
}  // namespace fastdreamer

#endif
