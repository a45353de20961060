// Categorical latents: unimixed log-probabilities, Gumbel-max draws, and their gradient. A warp
// takes one categorical of K classes at a time.
#ifndef FASTDREAMER_CUDA_LATENTS_H
#define FASTDREAMER_CUDA_LATENTS_H

#include "norm.h"

namespace fastdreamer {

struct Best {
  float value;
  int index;
#ifdef __CUDACC__
  __device__ Best from_lane(int far) const {
    return {__shfl_xor_sync(~0u, value, far), __shfl_xor_sync(~0u, index, far)};
  }
#endif
};

FD_FN int from_first_lane(int x) {
#ifdef __CUDA_ARCH__
  return __shfl_sync(~0u, x, 0);
#else
  return x;
#endif
}

// logp = ln(mix / K + (1 - mix) softmax(logits)), which may lie in the same memory; returns the
// first class of the greatest logp + noise.
FD_FN int draw(const float* logits, const float* noise, int K, float mix, float* logp) {
  Lanes<Sum> part;
  by_lane([&](int lane, int slot) {
    float most = -INFINITY;
    for (int k = lane; k < K; k += kWarp) most = logits[k] > most ? logits[k] : most;
    part.value[slot].value = most;
  });
  const float most = warp_max(part);
  const float total = warp_total(K, [&](int k) { return expf(logits[k] - most); });
  const float floor = mix / K, scale = (1.0f - mix) / total, log_total = most + logf(total);
  Lanes<Best> best;
  by_lane([&](int lane, int slot) {
    Best mine{-INFINITY, K - 1};
    for (int k = lane; k < K; k += kWarp) {
      const float v = logits[k];
      logp[k] = mix != 0 ? logf(expf(v - most) * scale + floor) : v - log_total;
      const float value = logp[k] + noise[k];
      if (k == lane || value > mine.value) mine = {value, k};
    }
    best.value[slot] = mine;
  });
  const Best first = warp_fold(best, [](Best a, Best b) {
    const bool other = b.value > a.value || (b.value == a.value && b.index < a.index);
    return other ? b : a;
  });
  return from_first_lane(first.index);  // lanes may differ where a value is NaN
}

// dlogits from dlogp and, through the sample, dstoch:
//   d = dlogp + dstoch p,  share = p - mix / K,  dlogits = share (d / p - sum(share d / p) / (1 - mix))
FD_FN void draw_gradient(
    const float* logp, const float* dlogp, const float* dstoch, const float* dcarry, int K, float mix,
    float* dlogits) {
  const float floor = mix / K, unit = mix < 1 ? 1 / (1 - mix) : 0;
  const auto gradient = [&](int k, float p) {  // share d / p
    const float d = dlogp[k] + (dstoch[k] + dcarry[k]) * p;
    return mix != 0 ? d * ((p - floor) / p) : d;
  };
  const float along = unit * warp_total(K, [&](int k) { return gradient(k, expf(logp[k])); });
  by_lane([&](int lane, int) {
    for (int k = lane; k < K; k += kWarp) {
      const float p = expf(logp[k]);
      dlogits[k] = gradient(k, p) - (p - floor) * along;
    }
  });
}

}  // namespace fastdreamer

#endif
