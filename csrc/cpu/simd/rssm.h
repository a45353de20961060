// One step of the recurrent state-space model for a few rows: layers, cells, latents.
#ifndef FASTDREAMER_CPU_SIMD_RSSM_H
#define FASTDREAMER_CPU_SIMD_RSSM_H

#include "fastdreamer.h"
#include "gemm.h"
#include "norm.h"
#include "rows.h"
#include "unimix.h"

namespace fastdreamer {
namespace FD_ISA {

static inline Packed pack_transposed(const fd_layer& layer) {  // for x W^T
  return Packed(layer.weight, layer.inputs, layer.outputs, 1, layer.stride);
}
static inline Packed pack(const fd_layer& layer) {  // for dy W
  return Packed(layer.weight, layer.outputs, layer.inputs, layer.stride, 1);
}
static inline Norm norm_of(const fd_rssm& model, const float* scale, const float* shift) {
  return {scale, shift, model.cell == FD_CELL_GRU, model.eps};
}

// The rows of W^T, one for each input: a product with a one-hot vector is one of them.
class Table {
 public:
  Table() = default;
  Table(const float* weight, int64_t inputs, int64_t outputs, int64_t stride)
      : outputs_(outputs), data_(inputs * outputs) {
    for (int64_t i = 0; i < inputs; ++i)
      for (int64_t o = 0; o < outputs; ++o) data_.get()[i * outputs + o] = weight[o * stride + i];
  }
  // y += the rows of each latent's class.
  void gather(const int32_t* index, int64_t stoch, int64_t classes, float* y) const {
    for (int64_t s = 0; s < stoch; ++s)
      if (index[s] >= 0) add(data_.get() + (s * classes + index[s]) * outputs_, y, outputs_);
  }

 private:
  int64_t outputs_ = 0;
  Buffer data_;
};

// The first class of the greatest logp + noise.
static inline int32_t draw(const float* logp, const float* noise, int64_t n) {
  int32_t best = 0;
  float highest = logp[0] + noise[0];
  for (int64_t i = 1; i < n; ++i) {
    const float value = logp[i] + noise[i];
    if (value > highest) highest = value, best = static_cast<int32_t>(i);
  }
  return best;
}

static inline void draw_latents(
    const fd_rssm& model, const float* logp, const float* noise, int32_t* index) {
  for (int64_t s = 0; s < model.stoch; ++s)
    index[s] = draw(logp + s * model.classes, noise + s * model.classes, model.classes);
}

}  // namespace FD_ISA
}  // namespace fastdreamer

#endif
