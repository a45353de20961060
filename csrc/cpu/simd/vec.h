// Vectors of kLanes floats by the compiler's own vector type, and the functions kernels need of
// them. Included by the sources that are compiled once for each instruction set.
#ifndef FASTDREAMER_CPU_SIMD_VEC_H
#define FASTDREAMER_CPU_SIMD_VEC_H

#include <math.h>
#include <stdint.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

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
#if defined(__AVX512F__)
static inline Vec load_part(const float* p, int64_t n, float rest = 0) {
  return _mm512_mask_loadu_ps(broadcast(rest), static_cast<__mmask16>((1 << n) - 1), p);
}
static inline void store_part(float* p, Vec x, int64_t n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1 << n) - 1), x);
}
#elif defined(__AVX2__)
static inline IntVec first_lanes(int64_t n) {
  return IntVec{0, 1, 2, 3, 4, 5, 6, 7} < static_cast<int32_t>(n);
}
static inline Vec load_part(const float* p, int64_t n, float rest = 0) {
  const IntVec first = first_lanes(n);
  return first ? Vec(_mm256_maskload_ps(p, reinterpret_cast<__m256i>(first))) : broadcast(rest);
}
static inline void store_part(float* p, Vec x, int64_t n) {
  _mm256_maskstore_ps(p, reinterpret_cast<__m256i>(first_lanes(n)), x);
}
#else
static inline Vec load_part(const float* p, int64_t n, float rest = 0) {
  Vec x = broadcast(rest);
  for (int64_t i = 0; i < n; ++i) x[i] = p[i];
  return x;
}
static inline void store_part(float* p, Vec x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = x[i];
}
#endif

#if defined(__AVX512F__)
// The forms with a mask of all lanes: GCC 12 warns of the others that they read undefined values.
constexpr __mmask16 kAll = 0xffff;
// Of two numbers where one is NaN: the second.
static inline Vec max(Vec x, Vec y) { return _mm512_maskz_max_ps(kAll, x, y); }
static inline Vec min(Vec x, Vec y) { return _mm512_maskz_min_ps(kAll, x, y); }
static inline Vec rsqrt(Vec x) { return 1.0f / _mm512_maskz_sqrt_ps(kAll, x); }
// x 2^n for whole n.
static inline Vec scale(Vec x, Vec n) { return _mm512_maskz_scalef_ps(kAll, x, n); }
// 1 / x within a unit in the last place, for finite x from 1 on.
static inline Vec reciprocal(Vec x) {
  const Vec guess = _mm512_maskz_rcp14_ps(kAll, x);
  return guess + guess * (1.0f - x * guess);
}
#else
static inline Vec rsqrt(Vec x) {
#if defined(__AVX2__)
  return 1.0f / Vec(_mm256_sqrt_ps(x));
#else
  for (int i = 0; i < kLanes; ++i) x[i] = sqrtf(x[i]);
  return 1.0f / x;
#endif
}
static inline Vec max(Vec x, Vec y) { return x > y ? x : y; }
static inline Vec min(Vec x, Vec y) { return x < y ? x : y; }
static inline Vec scale(Vec x, Vec n) {
  return x * from_bits((__builtin_convertvector(n, IntVec) + 127) << 23);
}
static inline Vec reciprocal(Vec x) { return 1.0f / x; }
#endif

template <int... lane>
struct Lanes {};
template <int count, int... lane>
struct LanesBelow : LanesBelow<count - 1, count - 1, lane...> {};
template <int... lane>
struct LanesBelow<0, lane...> {
  using type = Lanes<lane...>;
};
using AllLanes = LanesBelow<kLanes>::type;

// Element l of the result is element lane[l] of a, or lane[l] - kLanes of b.
template <int... lane>
static inline Vec shuffle(Vec a, Vec b, Lanes<lane...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, lane...);
#else
  return __builtin_shuffle(a, b, IntVec{lane...});
#endif
}

template <int step, int... lane>
static inline Vec swap_lanes(Vec x, Lanes<lane...>) {
  return shuffle(x, x, Lanes<(lane ^ step)...>());
}

// Joins the two halves of each 2 * step lanes, their halves and so on, in all lanes.
template <int step, typename Join>
static inline Vec join_lanes(Vec x, const Join& join) {
  if constexpr (step > 0)
    return join_lanes<step / 2>(join(x, swap_lanes<step>(x, AllLanes())), join);
  else
    return x;
}
template <int step>
static inline Vec sum_lanes(Vec x) {
  return join_lanes<step>(x, [](Vec a, Vec b) { return a + b; });
}
static inline float sum(Vec x) { return sum_lanes<kLanes / 2>(x)[0]; }
static inline float max(Vec x) {
  return join_lanes<kLanes / 2>(x, [](Vec a, Vec b) { return max(a, b); })[0];
}

// e^x within 2 units in the last place; below -87.3 it is the smallest normal number, NaN stays.
static inline Vec exp(Vec x) {
  const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  Vec y = min(broadcast(88.37626f), max(broadcast(-87.33654f), x));
  const Vec n = (y * 1.44269504088896341f + magic) - magic;
  y = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = broadcast(1.9875691500e-4f);
  p = p * y + 1.3981999507e-3f;
  p = p * y + 8.3334519073e-3f;
  p = p * y + 4.1665795894e-2f;
  p = p * y + 1.6666665459e-1f;
  p = p * y + 5.0000001201e-1f;
  p = p * (y * y) + y + 1.0f;
  return scale(p, n);
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

static inline Vec sigmoid(Vec x) { return reciprocal(1.0f + exp(-x)); }

// The same within 2^-12 of it, but 0 below -88.7.
static inline Vec rough_sigmoid(Vec x) {
#if defined(__AVX512F__)
  const Vec t = x * -1.44269504088896341f, part = _mm512_maskz_reduce_ps(kAll, t, 1);  // t - floor(t)
  Vec p = broadcast(7.80245e-2f);  // 2^part, nearest in relative error
  p = p * part + 2.2606719e-1f;
  p = p * part + 6.9583353e-1f;
  p = p * part + 9.9992522e-1f;
  return _mm512_maskz_rcp14_ps(kAll, 1.0f + scale(p, t));  // which takes the floor itself
#else
  return sigmoid(x);
#endif
}

static inline Vec tanh(Vec x) {
  // Near 0 the difference would cancel: there the series is exact to the last place.
  const Vec big = 1.0f - 2.0f * reciprocal(exp(x + x) + 1.0f), z = x * x;
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
typedef uint8_t ByteVec __attribute__((vector_size(kLanes), aligned(1), may_alias));
static inline IntVec load_bytes(const uint8_t* p, int n) {
  if (n == kLanes) return __builtin_convertvector(*reinterpret_cast<const ByteVec*>(p), IntVec);
  IntVec x{};
  for (int i = 0; i < n; ++i) x[i] = p[i];
  return x;
}
static inline void store_bytes(uint8_t* p, IntVec x, int n) {
  if (n == kLanes) *reinterpret_cast<ByteVec*>(p) = __builtin_convertvector(x, ByteVec);
  else for (int i = 0; i < n; ++i) p[i] = static_cast<uint8_t>(x[i]);
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
