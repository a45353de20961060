// The norm of norm.h for kLanes rows at once, a row to a lane: element c of all of them is the vector
// `step` elements behind that of element c - 1.
#ifndef FASTDREAMER_CPU_SIMD_NORM_LANES_H
#define FASTDREAMER_CPU_SIMD_NORM_LANES_H

#include "norm.h"

namespace fastdreamer {
namespace FD_ISA {

struct LaneMoments {
  Vec mean, r;
};

template <int step>
static inline LaneMoments lane_moments(const Norm& norm, const float* x, int64_t n) {
  const float share = 1.0f / n;
  Vec total{}, square{};
  if (norm.centred)
    for (int64_t c = 0; c < n; ++c) total += load(x + c * step);
  const Vec mean = total * share;
  for (int64_t c = 0; c < n; ++c) {
    const Vec d = load(x + c * step) - mean;
    square += d * d;
  }
  return {mean, rsqrt(square * share + norm.eps)};
}

// In place.
template <bool silu, typename N>
static inline void norm_lanes(const N& norm, float* x, int64_t n) {
  const LaneMoments m = lane_moments<kLanes>(norm, x, n);
  for (int64_t c = 0; c < n; ++c) {
    Vec v = (load(x + c * kLanes) - m.mean) * m.r * norm.scale[c];
    if (norm.shift) v += norm.shift[c];
    store(x + c * kLanes, silu ? v * norm.sigmoid(v) : v);
  }
}

// The gradient in place; adds to dscale and dshift, a vector for each element.
template <bool silu, int step, typename N>
static inline void norm_lanes_backward(
    const N& norm, const float* x, float* grad, float* dscale, float* dshift, int64_t n) {
  const LaneMoments m = lane_moments<step>(norm, x, n);
  Vec total{}, product{};
  for (int64_t c = 0; c < n; ++c) {
    const Vec xhat = (load(x + c * step) - m.mean) * m.r;
    Vec g = load(grad + c * kLanes);
    if (silu) {
      const Vec v = xhat * norm.scale[c] + (norm.shift ? norm.shift[c] : 0.0f), s = norm.sigmoid(v);
      g *= s * (1.0f + v * (1.0f - s));
    }
    store(dscale + c * kLanes, load(dscale + c * kLanes) + g * xhat);
    store(dshift + c * kLanes, load(dshift + c * kLanes) + g);
    g *= norm.scale[c];
    store(grad + c * kLanes, g);
    total += g;
    product += g * xhat;
  }
  const float share = 1.0f / n;
  const Vec mean = norm.centred ? total * share : Vec{}, along = product * share;
  for (int64_t c = 0; c < n; ++c) {
    const Vec xhat = (load(x + c * step) - m.mean) * m.r;
    store(grad + c * kLanes, (load(grad + c * kLanes) - mean - xhat * along) * m.r);
  }
}

}  // namespace FD_ISA
}  // namespace fastdreamer

#endif
