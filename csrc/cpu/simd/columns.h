// kLanes contiguous narrow rows at once, a row to a lane: sums over a row need no shuffling, and
// no lane idles where rows are shorter than a vector.
#ifndef FASTDREAMER_CPU_SIMD_COLUMNS_H
#define FASTDREAMER_CPU_SIMD_COLUMNS_H

#include "vec.h"

#if defined(__clang__)
#define FD_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FD_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, IntVec{__VA_ARGS__})
#endif

namespace fastdreamer {
namespace FD_ISA {

constexpr int64_t kNarrow = 128;  // the widest row that the functions below take

// Whether they are faster than row after row: the last vector of a wide row should be a whole one.
static inline bool by_columns(int64_t n) {
  return n <= 4 * kLanes || (n <= kNarrow && n % kLanes != 0);
}

template <int... index>
struct Indices {};
template <int count, int... index>
struct CountTo : CountTo<count - 1, count - 1, index...> {};
template <int... index>
struct CountTo<0, index...> {
  using type = Indices<index...>;
};

// Exchanges the odd blocks of `step` lanes of a with the even ones of b.
template <int step, int... lane>
static inline void exchange(Vec& a, Vec& b, Indices<lane...>) {
  const Vec even = FD_SHUFFLE(a, b, (lane & step ? kLanes + lane - step : lane)...);
  b = FD_SHUFFLE(a, b, (lane & step ? kLanes + lane : lane + step)...);
  a = even;
}

template <int step = kLanes / 2>
static inline void transpose(Vec* m) {
  if constexpr (step > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      if (!(i & step)) exchange<step>(m[i], m[i + step], typename CountTo<kLanes>::type{});
    transpose<step / 2>(m);
  }
}

// kLanes rows of n > 0 as n columns. `columns` has room for a multiple of kLanes.
static inline void load_columns(const float* x, int64_t n, Vec* columns) {
  float rows[kLanes * (kNarrow + 1)];
  for (int64_t i = 0; i < n; ++i) store(rows + i * kLanes, load(x + i * kLanes));
  store(rows + n * kLanes, Vec{});  // the last row is read past its end
  int64_t j = 0;
  do {
    for (int i = 0; i < kLanes; ++i) columns[j + i] = load(rows + i * n + j);
    transpose(columns + j);
    j += kLanes;
  } while (j < n);
}

static inline void store_columns(float* y, int64_t n, Vec* columns) {
  float rows[kLanes * (kNarrow + 1)];
  // From the last columns to the first: what runs over the end of a row is overwritten after it.
  for (int64_t j = (n - 1) / kLanes * kLanes; j >= 0; j -= kLanes) {
    transpose(columns + j);
    for (int i = 0; i < kLanes; ++i) store(rows + i * n + j, columns[j + i]);
  }
  for (int64_t i = 0; i < n; ++i) store(y + i * kLanes, load(rows + i * kLanes));
}

}  // namespace FD_ISA
}  // namespace fastdreamer

#endif
