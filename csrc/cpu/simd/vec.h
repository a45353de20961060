// Vectors of kLanes floats by the compiler's own vector type, and the functions kernels need of
// them. Included by the sources that are compiled once for each instruction set.
#ifndef FASTDREAMER_CPU_SIMD_VEC_H
#define FASTDREAMER_CPU_SIMD_VEC_H

#include <math.h>
#include <stdint.h>

namespace fastdreamer {
namespace FD_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef float UnalignedVec __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

static inline Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
static inline void store(float* p, Vec x) { *reinterpret_cast<UnalignedVec*>(p) = x; }
static inline IntVec bits(Vec x) { return reinterpret_cast<IntVec>(x); }
static inline Vec from_bits(IntVec x) { return reinterpret_cast<Vec>(x); }
static inline IntVec load_bits(const int32_t* p) {
  return bits(load(reinterpret_cast<const float*>(p)));
}
static inline void store_bits(int32_t* p, IntVec x) {
  store(reinterpret_cast<float*>(p), from_bits(x));
}
static inline Vec broadcast(float x) { return x - Vec{}; }

// The first n < kLanes elements; the others are `rest`.
static inline Vec load_part(const float* p, int64_t n, float rest = 0) {
  Vec x = broadcast(rest);
  for (int64_t i = 0; i < n; ++i) x[i] = p[i];
  return x;
}
static inline void store_part(float* p, Vec x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = x[i];
}

static inline float sum(Vec x) {
  for (int step = kLanes / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) x[i] += x[i + step];
  return x[0];
}
static inline float max(Vec x) {
  float best = x[0];
  for (int i = 1; i < kLanes; ++i) best = best > x[i] ? best : x[i];
  return best;
}
static inline Vec max(Vec x, Vec y) { return x > y ? x : y; }
static inline Vec min(Vec x, Vec y) { return x < y ? x : y; }
static inline Vec rsqrt(Vec x) {
  for (int i = 0; i < kLanes; ++i) x[i] = sqrtf(x[i]);
  return 1.0f / x;
}

// e^x within 2 units in the last place; below -87.3 it is the smallest normal number, NaN stays.
static inline Vec exp(Vec x) {
  const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  Vec y = min(max(x, broadcast(-87.33654f)), broadcast(88.37626f));
  const Vec n = (y * 1.44269504088896341f + magic) - magic;
  y = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = broadcast(1.9875691500e-4f);
  p = p * y + 1.3981999507e-3f;
  p = p * y + 8.3334519073e-3f;
  p = p * y + 4.1665795894e-2f;
  p = p * y + 1.6666665459e-1f;
  p = p * y + 5.0000001201e-1f;
  p = p * (y * y) + y + 1.0f;
  const Vec power = from_bits((__builtin_convertvector(n, IntVec) + 127) << 23);
  return x == x ? p * power : x;
}

// ln x of positive normal numbers, within 2 units in the last place; NaN stays.
static inline Vec log(Vec x) {
  IntVec exponent = ((bits(x) >> 23) & 0xff) - 126;
  Vec m = from_bits((bits(x) & 0x007fffff) | 0x3f000000);  // in [0.5, 1)
  const IntVec small = m < 0.707106781186547524f;
  exponent += small;  // a true comparison is -1
  m = (small ? m + m : m) - 1.0f;
  const Vec e = __builtin_convertvector(exponent, Vec), z = m * m;
  Vec p = broadcast(7.0376836292e-2f);
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  p = p * m * z - e * 2.12194440e-4f - 0.5f * z;
  return x == x ? m + p + e * 0.693359375f : x;
}

static inline Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp(-x)); }
static inline Vec tanh(Vec x) {
  // Near 0 the difference would cancel: there the series is exact to the last place.
  const Vec big = 1.0f - 2.0f / (exp(x + x) + 1.0f), z = x * x;
  const Vec small =
      x * (1.0f + z * (-0.333333333f + z * (0.133333333f + z * (-0.0539682540f + z * 0.0218694885f))));
  return z < 0.04f ? small : big;
}

// Calls body(first element, number of elements) over 0 .. n - 1 by vectors, the last maybe partial.
template <typename Body>
static inline void by_vectors(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, kLanes);
  if (i < n) body(i, static_cast<int>(n - i));
}
static inline Vec load_some(const float* p, int n, float rest = 0) {
  return n == kLanes ? load(p) : load_part(p, n, rest);
}
static inline void store_some(float* p, Vec x, int n) {
  if (n == kLanes) store(p, x);
  else store_part(p, x, n);
}

}  // namespace FD_ISA
}  // namespace fastdreamer

#endif
