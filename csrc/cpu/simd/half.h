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

static inline Vec widened(HalfVec x) {
#if defined(__AVX512F__)  // one instruction; not what GCC 12 makes of the other
  const auto wide =
      reinterpret_cast<UintVec>(_mm512_maskz_cvtepu16_epi32(kAll, reinterpret_cast<__m256i>(x)));
#else
  const auto wide = __builtin_convertvector(x, UintVec);
#endif
  return reinterpret_cast<Vec>(wide << 16);
}
static inline HalfVec narrowed(Vec x) {
#if defined(__AVX512BF16__)  // numbers below the normal ones become 0
  return reinterpret_cast<HalfVec>(_mm512_cvtneps_pbh(x));
#else
  return __builtin_convertvector(rounded(x) >> 16, HalfVec);
#endif
}

static inline void widen(const uint16_t* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    store(to + i, widened(*reinterpret_cast<const UnalignedHalfVec*>(from + i)));
  HalfVec rest{};
  for (int64_t j = 0; i + j < n; ++j) rest[j] = from[i + j];
  if (i < n) store_part(to + i, widened(rest), n - i);
}

static inline void narrow(const float* from, uint16_t* to, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    *reinterpret_cast<UnalignedHalfVec*>(to + i) = narrowed(load(from + i));
  if (i == n) return;
  const HalfVec rest = narrowed(load_part(from + i, n - i));
  for (int64_t j = 0; i + j < n; ++j) to[i + j] = rest[j];
}

}  // namespace FD_ISA
}  // namespace fastdreamer

#endif
