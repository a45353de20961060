// One step of the recurrent state-space model for a few rows: layers, cells, latents.
#ifndef FASTDREAMER_CPU_SIMD_RSSM_H
#define FASTDREAMER_CPU_SIMD_RSSM_H

#include "fastdreamer.h"
#include "gather.h"
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
    gather_row(data_.get(), index, stoch, classes, outputs_, y);
  }

 private:
  int64_t outputs_ = 0;
  Buffer data_;
};

static inline void write_one_hot(const fd_rssm& model, const int32_t* index, float* stoch) {
  fill(stoch, 0, model.stoch * model.classes);
  for (int64_t s = 0; s < model.stoch; ++s)
    if (index[s] >= 0) stoch[s * model.classes + index[s]] = 1;
}

// Copies M rows of n to rows first, first + step, ... of the next of several (rows, n) behind one
// another at `kept`, if that is not null.
static inline void keep_rows(
    int64_t M, Rows<const float> x, int64_t n, int64_t first, int64_t step, int64_t rows,
    float*& kept) {
  if (!kept) return;
  for (int64_t m = 0; m < M; ++m) stream(x[m], kept + (first + m * step) * n, n);
  kept += rows * n;
}

// An action as the cell takes it.
static inline void limit_action(const fd_rssm& model, const float* from, float* to) {
  for (int64_t i = 0; i < model.action; ++i) {
    const float size = from[i] < 0 ? -from[i] : from[i];
    to[i] = model.cell == FD_CELL_BLOCK_GRU && size > 1 ? from[i] / size : from[i];
  }
}

// One-hot of the first class of the greatest logp + noise.
static inline void draw_action(const float* logp, const float* noise, float* action, int64_t n) {
  int64_t best = 0;
  for (int64_t i = 1; i < n; ++i)
    if (logp[i] + noise[i] > logp[best] + noise[best]) best = i;
  for (int64_t i = 0; i < n; ++i) action[i] = i == best;
}

// mean + std noise with mean = tanh(raw), std = 0.9 sigmoid(raw + 2) + 0.1.
static inline void normal_action(const float* raw, const float* noise, float* action, int64_t n) {
  by_vectors(n, [&](int64_t i, int c) {
    const Vec std = 0.9f * sigmoid(load_some(raw + n + i, c) + 2.0f) + 0.1f;
    store_some(action + i, tanh(load_some(raw + i, c)) + std * load_some(noise + i, c), c);
  });
}

}  // namespace FD_ISA
}  // namespace fastdreamer

#endif
