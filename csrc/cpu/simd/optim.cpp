// Optimiser steps over n contiguous elements; the compiler vectorises the loops.
#include "optim.h"

#include <math.h>

#include "vec.h"

namespace fastdreamer {
namespace FD_ISA {

// As many floats as a register holds doubles.
constexpr int kDoubles = kLanes / 2;
typedef float FloatVec __attribute__((vector_size(4 * kDoubles), aligned(4), may_alias));
typedef double DoubleVec __attribute__((vector_size(8 * kDoubles)));

double sum_of_squares(const float* x, int64_t n) {
  DoubleVec lanes[4] = {};  // independent, to hide the latency of an addition
  int64_t i = 0;
  for (; i + 4 * kDoubles <= n; i += 4 * kDoubles)
    for (int j = 0; j < 4; ++j) {
      const auto* floats = reinterpret_cast<const FloatVec*>(x + i + j * kDoubles);
      const DoubleVec v = __builtin_convertvector(*floats, DoubleVec);
      lanes[j] += v * v;
    }
  double total = 0;
  for (; i < n; ++i) total += static_cast<double>(x[i]) * x[i];
  for (const DoubleVec& part : lanes)
    for (int l = 0; l < kDoubles; ++l) total += part[l];
  return total;
}

// nu += nu_rate (g^2 - nu);  mu += mu_rate (g / (sqrt(nu_scale nu) + eps) - mu);  p -= rate mu
// with g = scale grad
void laprop_step(
    float* __restrict p, const float* __restrict grad, float* __restrict nu, float* __restrict mu,
    int64_t n, const LaPropStep& step) {
  const LaPropStep s = step;
  for (int64_t i = 0; i < n; ++i) {
    const float g = grad[i] * s.scale;
    nu[i] += s.nu_rate * (g * g - nu[i]);
    mu[i] += s.mu_rate * (g / (sqrtf(nu[i] * s.nu_scale) + s.eps) - mu[i]);
    p[i] -= s.rate * mu[i];
  }
}

// mu += mu_rate (g - mu);  nu += nu_rate (g^2 - nu);  p -= rate mu / (sqrt(nu_scale nu) + eps)
// with g = scale grad
void adam_step(
    float* __restrict p, const float* __restrict grad, float* __restrict nu, float* __restrict mu,
    int64_t n, const AdamStep& step) {
  const AdamStep s = step;
  for (int64_t i = 0; i < n; ++i) {
    const float g = grad[i] * s.scale;
    mu[i] += s.mu_rate * (g - mu[i]);
    nu[i] += s.nu_rate * (g * g - nu[i]);
    p[i] -= s.rate * (mu[i] / (sqrtf(nu[i] * s.nu_scale) + s.eps));
  }
}

// target += rate (p - target)
void ema(float* __restrict target, const float* __restrict p, int64_t n, float rate) {
  for (int64_t i = 0; i < n; ++i) target[i] += rate * (p[i] - target[i]);
}

}  // namespace FD_ISA
}  // namespace fastdreamer
