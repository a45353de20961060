// One step of the recurrent state-space model for a few rows: layers, cells, latents.
#ifndef FASTDREAMER_CPU_SIMD_RSSM_H
#define FASTDREAMER_CPU_SIMD_RSSM_H

#include "fastdreamer.h"
#include "gemm.h"
#include "norm.h"

namespace fastdreamer {
namespace FD_ISA {

// Rows of a matrix that lie `stride` elements apart.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;
  T* operator[](int64_t row) const { return data + row * stride; }
};

static inline void copy(const float* from, float* to, int64_t n) {
  by_vectors(n, [&](int64_t i, int c) { store_some(to + i, load_some(from + i, c), c); });
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

// Log-probabilities of one categorical, mixed with the uniform distribution, from its logits.
static inline void unimix_row(const float* logits, float* logp, int64_t n, float mix) {
  Vec top = broadcast(-INFINITY), total{};
  by_vectors(n, [&](int64_t i, int c) { top = max(top, load_some(logits + i, c, -INFINITY)); });
  const float highest = max(top);
  by_vectors(n, [&](int64_t i, int c) {
    total += exp(load_some(logits + i, c, -INFINITY) - highest);
  });
  const float all = sum(total), share = (1 - mix) / all, floor = mix / n;
  const float level = highest + logf(all);
  by_vectors(n, [&](int64_t i, int c) {
    const Vec x = load_some(logits + i, c);
    store_some(logp + i, mix > 0 ? log(exp(x - highest) * share + floor) : x - level, c);
  });
}

static inline Vec swap_lanes(Vec x, int step) {  // lane i gets lane i ^ step
  IntVec from;
  for (int i = 0; i < kLanes; ++i) from[i] = i ^ step;
#ifdef __clang__
  Vec y;
  for (int i = 0; i < kLanes; ++i) y[i] = x[from[i]];
  return y;
#else
  return __builtin_shuffle(x, from);
#endif
}

// The same for categoricals of 2, 4, ... kLanes classes that lie behind one another.
static inline void unimix_groups(
    const float* logits, float* logp, int64_t total, int classes, float mix) {
  by_vectors(total, [&](int64_t i, int c) {
    const Vec x = load_some(logits + i, c);
    Vec top = x;
    for (int step = 1; step < classes; step *= 2) top = max(top, swap_lanes(top, step));
    const Vec e = exp(x - top);
    Vec all = e;
    for (int step = 1; step < classes; step *= 2) all += swap_lanes(all, step);
    store_some(logp + i, log(e * ((1 - mix) / all) + mix / classes), c);
  });
}

static inline void unimix_rows(
    const float* logits, float* logp, int64_t count, int64_t classes, float mix) {
  const bool grouped = classes <= kLanes && (classes & (classes - 1)) == 0 && mix > 0;
  if (grouped) return unimix_groups(logits, logp, count * classes, static_cast<int>(classes), mix);
  for (int64_t i = 0; i < count; ++i)
    unimix_row(logits + i * classes, logp + i * classes, classes, mix);
}

// dlogits (which may be dlogp) from the gradient of the log-probabilities.
static inline void unimix_row_backward(
    const float* logp, const float* dlogp, float* dlogits, int64_t n, float mix) {
  Vec total{};
  const float floor = mix / n;
  by_vectors(n, [&](int64_t i, int c) {
    const Vec p = exp(load_some(logp + i, c, -INFINITY));
    total += load_some(dlogp + i, c) * (p - floor) / p;
  });
  const float along = sum(total);
  by_vectors(n, [&](int64_t i, int c) {
    const Vec p = exp(load_some(logp + i, c)), share = p - floor;
    store_some(dlogits + i, load_some(dlogp + i, c) * share / p - share * (along / (1 - mix)), c);
  });
}

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
