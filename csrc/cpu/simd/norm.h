// LayerNorm or RMSNorm of one row with an optional SiLU behind it, forward and backward.
//   xhat = (x - mean) r,  r = 1 / sqrt(var + eps);  RMSNorm: mean = 0, var = the mean square
//   n = xhat scale + shift,  y = n or n sigmoid(n)
#ifndef FASTDREAMER_CPU_SIMD_NORM_H
#define FASTDREAMER_CPU_SIMD_NORM_H

#include <math.h>

#include "vec.h"

namespace fastdreamer {
namespace FD_ISA {

struct Norm {
  const float* scale;
  const float* shift;  // null: none
  bool centred;        // LayerNorm
  float eps;
};

struct Moments {
  float mean, r;
};

static inline Moments moments(const Norm& norm, const float* x, int64_t n) {
  Moments m{0, 0};
  if (norm.centred) {
    Vec total{};
    by_vectors(n, [&](int64_t i, int c) { total += load_some(x + i, c); });
    m.mean = sum(total) / n;
  }
  Vec square{};
  by_vectors(n, [&](int64_t i, int c) {
    const Vec d = load_some(x + i, c, m.mean) - m.mean;
    square += d * d;
  });
  m.r = 1.0f / sqrtf(sum(square) / n + norm.eps);
  return m;
}

template <bool silu>
static inline void scale_row(
    const Norm& norm, const Moments& m, const float* x, float* y, int64_t n) {
  by_vectors(n, [&](int64_t i, int c) {
    Vec v = (load_some(x + i, c) - m.mean) * m.r * load_some(norm.scale + i, c);
    if (norm.shift) v += load_some(norm.shift + i, c);
    store_some(y + i, silu ? v * sigmoid(v) : v, c);
  });
}

template <bool silu>
static inline void norm_row(const Norm& norm, const float* x, float* y, int64_t n) {
  scale_row<silu>(norm, moments(norm, x, n), x, y, n);
}

// The same for M rows, y maybe x: sums over a row take long, so that those of a few rows run side by
// side before any of them is scaled.
template <bool silu>
static inline void norm_each_row(
    const Norm& norm, int64_t M, const float* x, int64_t x_stride, float* y, int64_t y_stride,
    int64_t n) {
  constexpr int64_t kBeside = 8;
  for (int64_t first = 0; first < M; first += kBeside) {
    const int64_t rows = M - first < kBeside ? M - first : kBeside;
    Moments m[kBeside];
    for (int64_t i = 0; i < rows; ++i) m[i] = moments(norm, x + (first + i) * x_stride, n);
    for (int64_t i = 0; i < rows; ++i)
      scale_row<silu>(norm, m[i], x + (first + i) * x_stride, y + (first + i) * y_stride, n);
  }
}

// dx (which may be dy) from dy; adds to dscale and, if not null, dshift.
template <bool silu>
static inline void norm_row_backward(
    const Norm& norm, const float* x, const float* dy, float* dx, float* dscale, float* dshift,
    int64_t n) {
  const Moments m = moments(norm, x, n);
  Vec total{}, product{};
  by_vectors(n, [&](int64_t i, int c) {
    const Vec xhat = (load_some(x + i, c, m.mean) - m.mean) * m.r, scale = load_some(norm.scale + i, c);
    Vec dn = load_some(dy + i, c);
    if (silu) {
      Vec v = xhat * scale;
      if (norm.shift) v += load_some(norm.shift + i, c);
      const Vec s = sigmoid(v);
      dn *= s * (1.0f + v * (1.0f - s));
    }
    store_some(dscale + i, load_some(dscale + i, c) + dn * xhat, c);
    if (dshift) store_some(dshift + i, load_some(dshift + i, c) + dn, c);
    const Vec dxhat = dn * scale;
    total += dxhat;
    product += dxhat * xhat;
    store_some(dx + i, dxhat, c);
  });
  const float mean = norm.centred ? sum(total) / n : 0.0f, along = sum(product) / n;
  by_vectors(n, [&](int64_t i, int c) {
    const Vec xhat = (load_some(x + i, c, m.mean) - m.mean) * m.r;
    store_some(dx + i, (load_some(dx + i, c) - mean - xhat * along) * m.r, c);
  });
}

}  // namespace FD_ISA
}  // namespace fastdreamer

#endif
