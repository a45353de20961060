// LayerNorm or RMSNorm of rows with an optional SiLU behind it, forward and backward.
//   xhat = (x - mean) r,  r = 1 / sqrt(var + eps);  RMSNorm: mean = 0, var = the mean square
//   n = xhat scale + shift,  y = n or n sigmoid(n)
// R rows are computed side by side, because the parts of a sum wait for one another.
#ifndef FASTDREAMER_CPU_SIMD_NORM_H
#define FASTDREAMER_CPU_SIMD_NORM_H

#include "lanes.h"
#include "rows.h"

namespace fastdreamer {
namespace FD_ISA {

constexpr int kBeside = 4;
constexpr int kGroups = 2;  // of kBeside rows: the moments of all are computed before one is scaled
// Rows ahead that are fetched meanwhile: the processor itself does not follow so many at once.
constexpr int kAhead = kGroups * kBeside;

struct Norm {
  const float* scale;
  const float* shift;  // null: none
  bool centred;        // LayerNorm
  float eps;
  static Vec sigmoid(Vec x) { return FD_ISA::sigmoid(x); }
};

// For rows in bfloat16, whose rounding costs more; the gradients of scale and shift, which are not
// rounded, are off by less, for they are sums.
struct HalfNorm : Norm {
  static Vec sigmoid(Vec x) { return rough_sigmoid(x); }
};

// A number for each of R rows, in all lanes.
template <int R>
struct Each {
  Vec row[R];
};

// f of the sums over the lanes, added in the order of sum().
template <typename F>
static inline Each<1> of_sums(const Each<1>& x, const F& f) {
  return {{f(sum_lanes<kLanes / 2>(x.row[0]))}};
}

template <typename F>
static inline Each<4> of_sums(Each<4> x, const F& f) {
  Vec* v = x.row;
  swap_blocks<kLanes / 2>(v[0], v[1], AllLanes());
  swap_blocks<kLanes / 2>(v[2], v[3], AllLanes());
  Vec low = v[0] + v[1], high = v[2] + v[3];
  swap_blocks<kLanes / 4>(low, high, AllLanes());
  const Vec y = f(sum_lanes<kLanes / 8>(low + high));
  return {{broadcast(y[0]), broadcast(y[kLanes / 2]), broadcast(y[kLanes / 4]),
           broadcast(y[kLanes / 2 + kLanes / 4])}};
}

template <int R>
struct Moments {
  Each<R> mean, r;
};

template <int R>
static inline Moments<R> moments(const Norm& norm, Rows<const float> x, int64_t n) {
  const float share = 1.0f / n;
  Each<R> mean{}, total{}, square{};
  if (norm.centred) {
    by_vectors(n, [&](int64_t i, int c) {
      for (int k = 0; k < R; ++k) total.row[k] += load_some(x[k] + i, c);
    });
    mean = of_sums(total, [&](Vec s) { return s * share; });
  }
  by_vectors(n, [&](int64_t i, int c) {
    for (int k = 0; k < R; ++k) {
      const Vec d = load_some(x[k] + i, c, mean.row[k][0]) - mean.row[k];
      square.row[k] += d * d;
    }
  });
  return {mean, of_sums(square, [&](Vec s) { return rsqrt(s * share + norm.eps); })};
}

template <bool silu, int R, typename N>
static inline void scale_rows(
    const N& norm, const Moments<R>& m, Rows<const float> x, Rows<float> y, int64_t n) {
  by_vectors(n, [&](int64_t i, int c) {
    const Vec scale = load_some(norm.scale + i, c);
    const Vec shift = norm.shift ? load_some(norm.shift + i, c) : Vec{};
    for (int k = 0; k < R; ++k) {
      if constexpr (R > 1) {
        __builtin_prefetch(x[k + kAhead] + i);
        __builtin_prefetch(y[k + kAhead] + i, 1);
      }
      const Vec v = (load_some(x[k] + i, c) - m.mean.row[k]) * m.r.row[k] * scale + shift;
      store_some(y[k] + i, silu ? v * norm.sigmoid(v) : v, c);
    }
  });
}

template <bool silu, typename N>
static inline void norm_row(const N& norm, const float* x, float* y, int64_t n) {
  scale_rows<silu, 1>(norm, moments<1>(norm, {x, 0}, n), {x, 0}, {y, 0}, n);
}

// Calls body(first row, groups of kBeside rows) for all but the last M % kBeside rows; returns the
// first of those.
template <typename Body>
static inline int64_t by_groups(int64_t M, const Body& body) {
  int64_t i = 0;
  for (; i + kAhead <= M; i += kAhead) body(i, kGroups);
  for (; i + kBeside <= M; i += kBeside) body(i, 1);
  return i;
}

// The same for M rows, y maybe x.
template <bool silu, typename N>
static inline void norm_each_row(
    const N& norm, int64_t M, const float* x, int64_t x_stride, float* y, int64_t y_stride,
    int64_t n) {
  const Rows<const float> from{x, x_stride};
  const Rows<float> to{y, y_stride};
  int64_t i = by_groups(M, [&](int64_t first, int groups) {
    Moments<kBeside> m[kGroups];
    for (int g = 0; g < groups; ++g)
      m[g] = moments<kBeside>(norm, from.from(first + g * kBeside), n);
    for (int g = 0; g < groups; ++g)
      scale_rows<silu, kBeside>(
          norm, m[g], from.from(first + g * kBeside), to.from(first + g * kBeside), n);
  });
  for (; i < M; ++i) norm_row<silu>(norm, from[i], to[i], n);
}

// What the norm removes from the gradient of xhat: its mean, and its component along xhat.
template <int R>
struct Projection {
  Each<R> mean, along;
};

// grad, which may be dy, becomes the gradient of xhat; adds to dscale and, if not null, dshift.
template <bool silu, int R, typename N>
static inline Projection<R> xhat_gradient(
    const N& norm, const Moments<R>& m, Rows<const float> x, Rows<const float> dy,
    Rows<float> grad, float* dscale, float* dshift, int64_t n) {
  Each<R> total{}, product{};
  by_vectors(n, [&](int64_t i, int c) {
    const Vec scale = load_some(norm.scale + i, c);
    const Vec shift = norm.shift ? load_some(norm.shift + i, c) : Vec{};
    Vec to_scale{}, to_shift{};
    for (int k = 0; k < R; ++k) {
      const Vec xhat = (load_some(x[k] + i, c, m.mean.row[k][0]) - m.mean.row[k]) * m.r.row[k];
      Vec dn = load_some(dy[k] + i, c);
      if constexpr (R > 1) {
        __builtin_prefetch(x[k + kAhead] + i);
        __builtin_prefetch(grad[k + kAhead] + i, 1);
        __builtin_prefetch(dy[k + kAhead] + i);
      }
      if (silu) {
        const Vec v = xhat * scale + shift, s = norm.sigmoid(v);
        dn *= s * (1.0f + v * (1.0f - s));
      }
      to_scale += dn * xhat;
      to_shift += dn;
      const Vec dxhat = dn * scale;
      total.row[k] += dxhat;
      product.row[k] += dxhat * xhat;
      store_some(grad[k] + i, dxhat, c);
    }
    store_some(dscale + i, load_some(dscale + i, c) + to_scale, c);
    if (dshift) store_some(dshift + i, load_some(dshift + i, c) + to_shift, c);
  });
  const float share = 1.0f / n;
  const auto mean_of = [&](Vec s) { return s * share; };
  return {norm.centred ? of_sums(total, mean_of) : Each<R>{}, of_sums(product, mean_of)};
}

// Makes it the gradient of x, in place.
template <int R>
static inline void x_gradient(
    const Moments<R>& m, const Projection<R>& removed, Rows<const float> x, Rows<float> grad,
    int64_t n) {
  by_vectors(n, [&](int64_t i, int c) {
    for (int k = 0; k < R; ++k) {
      const Vec xhat = (load_some(x[k] + i, c) - m.mean.row[k]) * m.r.row[k];
      const Vec dxhat = load_some(grad[k] + i, c) - removed.mean.row[k];
      store_some(grad[k] + i, (dxhat - xhat * removed.along.row[k]) * m.r.row[k], c);
    }
  });
}

// dx (which may be dy) from dy; adds to dscale and, if not null, dshift.
template <bool silu, typename N>
static inline void norm_row_backward(
    const N& norm, const float* x, const float* dy, float* dx, float* dscale, float* dshift,
    int64_t n) {
  const Moments<1> m = moments<1>(norm, {x, 0}, n);
  const Projection<1> removed =
      xhat_gradient<silu, 1>(norm, m, {x, 0}, {dy, 0}, {dx, 0}, dscale, dshift, n);
  x_gradient<1>(m, removed, {x, 0}, {dx, 0}, n);
}

// The same for M rows.
template <bool silu, typename N>
static inline void norm_each_row_backward(
    const N& norm, int64_t M, Rows<const float> x, Rows<const float> dy, Rows<float> dx,
    float* dscale, float* dshift, int64_t n) {
  int64_t i = by_groups(M, [&](int64_t first, int groups) {
    Moments<kBeside> m[kGroups];
    Projection<kBeside> removed[kGroups];
    for (int g = 0; g < groups; ++g)
      m[g] = moments<kBeside>(norm, x.from(first + g * kBeside), n);
    for (int g = 0; g < groups; ++g) {
      const int64_t row = first + g * kBeside;
      removed[g] = xhat_gradient<silu, kBeside>(
          norm, m[g], x.from(row), dy.from(row), dx.from(row), dscale, dshift, n);
    }
    for (int g = 0; g < groups; ++g) {
      const int64_t row = first + g * kBeside;
      x_gradient<kBeside>(m[g], removed[g], x.from(row), dx.from(row), n);
    }
  });
  for (; i < M; ++i) norm_row_backward<silu>(norm, x[i], dy[i], dx[i], dscale, dshift, n);
}

}  // namespace FD_ISA
}  // namespace fastdreamer

#endif
