// The recurrent cells behind their input layers: forward and backward of one step.
#ifndef FASTDREAMER_CPU_SIMD_GATES_H
#define FASTDREAMER_CPU_SIMD_GATES_H

#include "gemm.h"
#include "gru.h"
#include "norm.h"
#include "rows.h"

namespace fastdreamer {
namespace FD_ISA {

// Units of the cell's norm.
static inline int64_t cell_width(const fd_gru& cell) {
  return cell.cell == FD_CELL_GRU ? 3 * cell.deter : cell.deter;
}
static inline Norm norm_of(const fd_gru& cell) {
  return {cell.scale, cell.shift, cell.cell == FD_CELL_GRU, cell.eps};
}

// N vectors of `count` lanes: function after function, because each is one long chain of operations
// and the processor does not look far enough ahead to start the next vector's meanwhile.
template <int N>
static inline void apply_gates(
    const float* reset, const float* cand, const float* update, const float* h, float* next,
    int count) {
  Vec value[N], u[N];
  for (int j = 0; j < N; ++j)
    value[j] = sigmoid(load_some(reset + j * kLanes, count)) * load_some(cand + j * kLanes, count);
  for (int j = 0; j < N; ++j) u[j] = sigmoid(load_some(update + j * kLanes, count) - 1.0f);
  for (int j = 0; j < N; ++j) value[j] = tanh(value[j]);
  for (int j = 0; j < N; ++j) {
    const Vec old = load_some(h + j * kLanes, count);
    store_some(next + j * kLanes, u[j] * value[j] + (1.0f - u[j]) * old, count);
  }
}

// next = u tanh(r c) + (1 - u) h with r, c, u = sigmoid(reset), cand, sigmoid(update - 1), which
// lie behind one another for `width` units.
static inline void apply_gates(const float* gates, const float* h, float* next, int64_t width) {
  constexpr int kAtOnce = 4;
  const float *reset = gates, *cand = gates + width, *update = cand + width;
  int64_t i = 0;
  for (; i + kAtOnce * kLanes <= width; i += kAtOnce * kLanes)
    apply_gates<kAtOnce>(reset + i, cand + i, update + i, h + i, next + i, kLanes);
  for (; i < width; i += kLanes) {
    const int count = width - i < kLanes ? static_cast<int>(width - i) : kLanes;
    apply_gates<1>(reset + i, cand + i, update + i, h + i, next + i, count);
  }
}

// dgates and dh from dnext.
static inline void apply_gates_backward(
    const float* gates, const float* h, const float* dnext, float* dgates, float* dh, int64_t D,
    int64_t groups) {
  const int64_t width = D / groups;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t at = 3 * g * width;
    by_vectors(width, [&](int64_t i, int n) {
      const Vec r = sigmoid(load_some(gates + at + i, n)), c = load_some(gates + at + width + i, n);
      const Vec u = sigmoid(load_some(gates + at + 2 * width + i, n) - 1.0f), value = tanh(r * c);
      const Vec d = load_some(dnext + g * width + i, n), old = load_some(h + g * width + i, n);
      const Vec inner = d * u * (1.0f - value * value);
      store_some(dgates + at + i, inner * c * r * (1.0f - r), n);
      store_some(dgates + at + width + i, inner * r, n);
      store_some(dgates + at + 2 * width + i, d * (value - old) * u * (1.0f - u), n);
      store_some(dh + g * width + i, d * (1.0f - u), n);
    });
  }
}

// The weights (U, D) by which the input enters all blocks of hidden units.
static inline Buffer input_weights(const fd_gru& cell) {
  const int64_t D = cell.deter, U = cell.inputs, width = D / cell.blocks;
  Buffer joined(U * D);
  for (int64_t g = 0; g < cell.blocks; ++g) {
    const float* block = cell.hidden_weight + (g * (width + U) + width) * width;
    for (int64_t u = 0; u < U; ++u)
      copy(block + u * width, joined.get() + u * D + g * width, width);
  }
  return joined;
}

// The weights behind the input layers, packed for the forward pass.
class Gates {
 public:
  explicit Gates(const fd_gru& cell) : cell_(cell) {
    const int64_t D = cell.deter, U = cell.inputs, width = D / cell.blocks;
    if (cell.cell == FD_CELL_GRU) {
      state_[0] = Packed(cell.gate_weight, D, 3 * D, 1, D + U);
      input_ = Packed(cell.gate_weight + D, U, 3 * D, 1, D + U);
      return;
    }
    input_ = Packed(input_weights(cell).get(), U, D, D, 1);
    for (int64_t g = 0; g < cell.blocks; ++g) {
      const float* hidden = cell.hidden_weight + g * (width + U) * width;
      state_[g] = Packed(hidden, width, width, width, 1);
      gates_[g] = Packed(cell.gate_weight + g * width * 3 * width, width, 3 * width, 3 * width, 1);
    }
  }

  // Floats of scratch for M rows.
  int64_t scratch(int64_t M) const {
    return M * cell_.deter * (cell_.cell == FD_CELL_GRU || cell_.blocks < 3 ? 3 : 1);
  }

  // next (M, D) from h (M, D) and x (M, U); hidden (M, D; blocks only) and gates (M, 3 D) are what
  // the backward pass needs, see fd_observe. Without gates nothing is kept, and hidden is
  // scratch.
  void step(
      int64_t M, Rows<const float> h, Rows<const float> x, Rows<float> hidden, Rows<float> gates,
      Rows<float> next, float* scratch) const {
    if (cell_.cell == FD_CELL_GRU) gru(M, h, x, gates, next, scratch);
    else block_gru(M, h, x, hidden, gates, next, scratch);
  }

 private:
  void gru(
      int64_t M, Rows<const float> h, Rows<const float> x, Rows<float> gates, Rows<float> next,
      float* scratch) const {
    const int64_t D = cell_.deter;
    const Rows<float> raw = gates.data ? gates : Rows<float>{scratch, 3 * D};
    gemm(M, h.data, h.stride, state_[0], raw.data, raw.stride);
    gemm(M, x.data, x.stride, input_, raw.data, raw.stride, true);
    for (int64_t m = 0; m < M; m += kAhead) {
      const int64_t rows = M - m < kAhead ? M - m : kAhead;
      const Rows<float> normed{gates.data ? scratch : raw[m], 3 * D};
      norm_each_row<false>(norm_of(cell_), rows, raw[m], raw.stride, normed.data, 3 * D, 3 * D);
      for (int64_t i = 0; i < rows; ++i) apply_gates(normed[i], h[m + i], next[m + i], D);
    }
  }

  void block_gru(
      int64_t M, Rows<const float> h, Rows<const float> x, Rows<float> hidden, Rows<float> gates,
      Rows<float> next, float* scratch) const {
    const int64_t D = cell_.deter, G = cell_.blocks, width = D / G;
    start_rows(hidden, cell_.hidden_bias, M, D);
    gemm(M, x.data, x.stride, input_, hidden.data, hidden.stride, true);
    for (int64_t at = 0; at < D; at += width)
      gemm(
          M, h.data + at, h.stride, state_[at / width], hidden.data + at, hidden.stride, true);
    const Rows<float> z = gates.data ? Rows<float>{scratch, D} : hidden;
    norm_each_row<true>(norm_of(cell_), M, hidden.data, hidden.stride, z.data, z.stride, D);
    for (int64_t g = 0; g < G; ++g) {
      const int64_t at = g * width;
      const Rows<float> group = gates.data ? Rows<float>{gates.data + 3 * at, gates.stride}
                                           : Rows<float>{scratch, 3 * width};
      start_rows(group, cell_.gate_bias + 3 * at, M, 3 * width);
      gemm(M, z.data + at, z.stride, gates_[g], group.data, group.stride, true);
      for (int64_t m = 0; m < M; ++m) apply_gates(group[m], h[m] + at, next[m] + at, width);
    }
  }

  fd_gru cell_;
  Packed input_, state_[kMaxBlocks], gates_[kMaxBlocks];
};

// The same weights, packed for the backward pass.
class GatesGrad {
 public:
  explicit GatesGrad(const fd_gru& cell) : cell_(cell) {
    const int64_t D = cell.deter, U = cell.inputs, width = D / cell.blocks;
    if (cell.cell == FD_CELL_GRU) {
      state_[0] = Packed(cell.gate_weight, 3 * D, D, D + U, 1);
      input_ = Packed(cell.gate_weight + D, 3 * D, U, D + U, 1);
      return;
    }
    input_ = Packed(input_weights(cell).get(), D, U, 1, D);
    for (int64_t g = 0; g < cell.blocks; ++g) {
      const float* hidden = cell.hidden_weight + g * (width + U) * width;
      state_[g] = Packed(hidden, width, width, 1, width);
      gates_[g] = Packed(cell.gate_weight + g * width * 3 * width, 3 * width, width, 1, 3 * width);
    }
  }

  int64_t scratch(int64_t M) const {
    return cell_.deter * (cell_.cell == FD_CELL_GRU ? 3 : M);
  }

  // dhidden, dgates and dh from dnext (M, D); adds to dx (M, U) and to dnorm, the scale and behind
  // it the shift of the cell's norm.
  void step(
      int64_t M, Rows<const float> h, Rows<const float> hidden, Rows<const float> gates,
      Rows<const float> dnext, Rows<float> dhidden, Rows<float> dgates, Rows<float> dh,
      Rows<float> dx, float* dnorm, float* scratch) const {
    if (cell_.cell == FD_CELL_GRU) gru(M, h, gates, dnext, dgates, dh, dx, dnorm, scratch);
    else block_gru(M, h, hidden, gates, dnext, dhidden, dgates, dh, dx, dnorm, scratch);
  }

 private:
  void gru(
      int64_t M, Rows<const float> h, Rows<const float> gates, Rows<const float> dnext,
      Rows<float> dgates, Rows<float> dh, Rows<float> dx, float* dnorm, float* scratch) const {
    const int64_t D = cell_.deter;
    const Norm norm = norm_of(cell_);
    for (int64_t m = 0; m < M; ++m) {
      norm_row<false>(norm, gates[m], scratch, 3 * D);
      apply_gates_backward(scratch, h[m], dnext[m], dgates[m], dh[m], D, 1);
      norm_row_backward<false>(norm, gates[m], dgates[m], dgates[m], dnorm, dnorm + 3 * D, 3 * D);
    }
    gemm(M, dgates.data, dgates.stride, state_[0], dh.data, dh.stride, true);
    gemm(M, dgates.data, dgates.stride, input_, dx.data, dx.stride, true);
  }

  void block_gru(
      int64_t M, Rows<const float> h, Rows<const float> hidden, Rows<const float> gates,
      Rows<const float> dnext, Rows<float> dhidden, Rows<float> dgates, Rows<float> dh,
      Rows<float> dx, float* dnorm, float* scratch) const {
    const int64_t D = cell_.deter, G = cell_.blocks, width = D / G;
    const Rows<float> dz{scratch, D};
    for (int64_t m = 0; m < M; ++m)
      apply_gates_backward(gates[m], h[m], dnext[m], dgates[m], dh[m], D, G);
    for (int64_t g = 0; g < G; ++g)
      gemm(M, dgates.data + 3 * g * width, dgates.stride, gates_[g], dz.data + g * width, D);
    for (int64_t m = 0; m < M; ++m)
      norm_row_backward<true>(norm_of(cell_), hidden[m], dz[m], dhidden[m], dnorm, nullptr, D);
    gemm(M, dhidden.data, dhidden.stride, input_, dx.data, dx.stride, true);
    for (int64_t at = 0; at < D; at += width)
      gemm(
          M, dhidden.data + at, dhidden.stride, state_[at / width], dh.data + at, dh.stride, true);
  }

  fd_gru cell_;
  Packed input_, state_[kMaxBlocks], gates_[kMaxBlocks];
};

}  // namespace FD_ISA
}  // namespace fastdreamer

#endif
