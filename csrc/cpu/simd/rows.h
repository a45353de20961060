// Rows of matrices, and what is done to them element by element.
#ifndef FASTDREAMER_CPU_SIMD_ROWS_H
#define FASTDREAMER_CPU_SIMD_ROWS_H

#include "vec.h"

namespace fastdreamer {
namespace FD_ISA {

// Rows of a matrix that lie `stride` elements apart.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;
  T* operator[](int64_t row) const { return data + row * stride; }
  Rows from(int64_t row) const { return {data + row * stride, stride}; }
};

static inline void copy(const float* from, float* to, int64_t n) {
  by_vectors(n, [&](int64_t i, int c) { store_some(to + i, load_some(from + i, c), c); });
}

// The same past the caches, for what is read much later; call end_streams before another thread may.
static inline void stream(const float* from, float* to, int64_t n) {
#if defined(__AVX2__)
  if (reinterpret_cast<uintptr_t>(to) % sizeof(Vec) == 0 && n % kLanes == 0) {
    for (int64_t i = 0; i < n; i += kLanes)
#if defined(__AVX512F__)
      _mm512_stream_ps(to + i, load(from + i));
#else
      _mm256_stream_ps(to + i, load(from + i));
#endif
    return;
  }
#endif
  copy(from, to, n);
}
static inline void end_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

static inline void add(const float* from, float* to, int64_t n) {
  by_vectors(n, [&](int64_t i, int c) {
    store_some(to + i, load_some(to + i, c) + load_some(from + i, c), c);
  });
}
static inline void fill(float* to, float value, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = value;
}
// Starts rows of a product at their bias, or at 0.
static inline void start_rows(Rows<float> to, const float* bias, int64_t M, int64_t n) {
  for (int64_t m = 0; m < M; ++m) {
    if (bias) copy(bias, to[m], n);
    else fill(to[m], 0, n);
  }
}

}  // namespace FD_ISA
}  // namespace fastdreamer

#endif
