// The recurrent cells of rssm.h's models: forward, backward, and what they keep in between.
#ifndef FASTDREAMER_CPU_SIMD_CELL_H
#define FASTDREAMER_CPU_SIMD_CELL_H

#include "rssm.h"

namespace fastdreamer {
namespace FD_ISA {

constexpr int64_t kMaxBlocks = 64;

// What a step keeps for its backward pass; see fd_observe.
struct Kept {
  Rows<float> inputs, hidden, gates;
};

static inline int64_t input_width(const fd_rssm& model) {
  return model.cell == FD_CELL_GRU ? model.hidden : 3 * model.hidden;
}
static inline int64_t cell_width(const fd_rssm& model) {
  return model.cell == FD_CELL_GRU ? 3 * model.deter : model.deter;
}

// next = u tanh(r c) + (1 - u) h with r, c, u = sigmoid(reset), cand, sigmoid(update - 1); the
// gates of each of G groups of D / G units lie behind one another.
static inline void apply_gates(
    const float* gates, const float* h, float* next, int64_t D, int64_t groups) {
  const int64_t width = D / groups;
  for (int64_t g = 0; g < groups; ++g) {
    const float *reset = gates + 3 * g * width, *cand = reset + width, *update = cand + width;
    by_vectors(width, [&](int64_t i, int c) {
      const Vec u = sigmoid(load_some(update + i, c) - 1.0f);
      const Vec value = tanh(sigmoid(load_some(reset + i, c)) * load_some(cand + i, c));
      const Vec old = load_some(h + g * width + i, c);
      store_some(next + g * width + i, u * value + (1.0f - u) * old, c);
    });
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

// The weights of a cell, packed for the forward pass.
class Cell {
 public:
  explicit Cell(const fd_rssm& model)
      : model_(model),
        stoch_(model.in_stoch.weight, model.stoch * model.classes, model.hidden, model.in_stoch.stride),
        action_(pack_transposed(model.in_action)) {
    const int64_t D = model.deter, U = model.hidden, width = D / model.blocks;
    if (model.cell == FD_CELL_GRU) {
      state_[0] = Packed(model.gate_weight, D, 3 * D, 1, D + U);
      input_[0] = Packed(model.gate_weight + D, U, 3 * D, 1, D + U);
      return;
    }
    deter_ = pack_transposed(model.in_deter);
    for (int64_t g = 0; g < model.blocks; ++g) {
      const float* hidden = model.hidden_weight + g * (width + 3 * U) * width;
      state_[g] = Packed(hidden, width, width, width, 1);
      input_[g] = Packed(hidden + width * width, 3 * U, width, width, 1);
      gates_[g] = Packed(model.gate_weight + g * width * 3 * width, width, 3 * width, 3 * width, 1);
    }
  }

  // Floats of scratch for M rows.
  int64_t scratch(int64_t M) const {
    return M * (input_width(model_) + 3 * model_.deter + model_.deter);
  }

  // next (M, D) from h (M, D), drawn classes (M, S) and action (M, A).
  void step(
      int64_t M, Rows<const float> h, Rows<const int32_t> index, Rows<const float> action,
      const Kept& kept, Rows<float> next, float* scratch) const {
    const Rows<float> x{scratch, input_width(model_)};
    inputs(M, h, index, action, kept.inputs, x);
    float* rest = scratch + M * x.stride;
    if (model_.cell == FD_CELL_GRU) gru(M, h, x, kept, next, rest);
    else block_gru(M, h, x, kept, next, rest);
  }

 private:
  void inputs(
      int64_t M, Rows<const float> h, Rows<const int32_t> index, Rows<const float> action,
      Rows<float> before, Rows<float> x) const {
    const fd_rssm& model = model_;
    const int64_t U = model.hidden;
    const bool blocks = model.cell == FD_CELL_BLOCK_GRU;
    const int64_t at_stoch = blocks ? U : 0, at_action = blocks ? 2 * U : 0;
    for (int64_t m = 0; m < M; ++m) {
      fill(before[m], 0, input_width(model));
      if (blocks) {
        copy(model.in_deter.bias, before[m], U);
        copy(model.in_stoch.bias, before[m] + U, U);
        copy(model.in_action.bias, before[m] + 2 * U, U);
      }
      stoch_.gather(index[m], model.stoch, model.classes, before[m] + at_stoch);
    }
    gemm(M, action.data, action.stride, action_, before.data + at_action, before.stride, true);
    if (blocks) gemm(M, h.data, h.stride, deter_, before.data, before.stride, true);
    for (int64_t m = 0; m < M; ++m) {
      if (blocks) {
        norm_row<true>(norm_of(model, model.in_deter.scale, nullptr), before[m], x[m], U);
        norm_row<true>(norm_of(model, model.in_action.scale, nullptr), before[m] + 2 * U, x[m] + 2 * U, U);
      }
      const Norm norm = norm_of(model, model.in_stoch.scale, model.in_stoch.shift);
      norm_row<true>(norm, before[m] + at_stoch, x[m] + at_stoch, U);
    }
  }

  void gru(
      int64_t M, Rows<const float> h, Rows<float> x, const Kept& kept, Rows<float> next,
      float* scratch) const {
    const int64_t D = model_.deter;
    gemm(M, h.data, h.stride, state_[0], kept.gates.data, kept.gates.stride);
    gemm(M, x.data, x.stride, input_[0], kept.gates.data, kept.gates.stride, true);
    const Norm norm = norm_of(model_, model_.cell_scale, model_.cell_shift);
    for (int64_t m = 0; m < M; ++m) {
      norm_row<false>(norm, kept.gates[m], scratch, 3 * D);
      apply_gates(scratch, h[m], next[m], D, 1);
    }
  }

  void block_gru(
      int64_t M, Rows<const float> h, Rows<float> x, const Kept& kept, Rows<float> next,
      float* scratch) const {
    const int64_t D = model_.deter, G = model_.blocks, width = D / G;
    start_rows(kept.hidden, model_.hidden_bias, M, D);
    for (int64_t g = 0; g < G; ++g) {
      float* hidden = kept.hidden.data + g * width;
      gemm(M, h.data + g * width, h.stride, state_[g], hidden, kept.hidden.stride, true);
      gemm(M, x.data, x.stride, input_[g], hidden, kept.hidden.stride, true);
    }
    const Rows<float> z{scratch, D};
    const Norm norm = norm_of(model_, model_.cell_scale, nullptr);
    for (int64_t m = 0; m < M; ++m) norm_row<true>(norm, kept.hidden[m], z[m], D);
    start_rows(kept.gates, model_.gate_bias, M, 3 * D);
    for (int64_t g = 0; g < G; ++g) {
      float* gates = kept.gates.data + 3 * g * width;
      gemm(M, z.data + g * width, D, gates_[g], gates, kept.gates.stride, true);
    }
    for (int64_t m = 0; m < M; ++m) apply_gates(kept.gates[m], h[m], next[m], D, G);
  }

  const fd_rssm& model_;
  Table stoch_;
  Packed action_, deter_, state_[kMaxBlocks], input_[kMaxBlocks], gates_[kMaxBlocks];
};

// The weights of a cell, packed for the backward pass.
class CellGrad {
 public:
  explicit CellGrad(const fd_rssm& model)
      : model_(model),
        stoch_(model.in_stoch.weight, model.hidden, model.stoch * model.classes, model.in_stoch.stride, 1) {
    const int64_t D = model.deter, U = model.hidden, width = D / model.blocks;
    if (model.cell == FD_CELL_GRU) {
      state_[0] = Packed(model.gate_weight, 3 * D, D, D + U, 1);
      input_[0] = Packed(model.gate_weight + D, 3 * D, U, D + U, 1);
      return;
    }
    deter_ = pack(model.in_deter);
    for (int64_t g = 0; g < model.blocks; ++g) {
      const float* hidden = model.hidden_weight + g * (width + 3 * U) * width;
      state_[g] = Packed(hidden, width, width, 1, width);
      input_[g] = Packed(hidden + width * width, width, 3 * U, 1, width);
      gates_[g] = Packed(model.gate_weight + g * width * 3 * width, 3 * width, width, 1, 3 * width);
    }
  }

  int64_t scratch(int64_t M) const {
    return M * (input_width(model_) + 3 * model_.deter) + 3 * model_.deter;
  }

  // Gradients of what a step kept, and of its state and (added) classes, from dnext (M, D).
  // dnorm: scale and shift of the inputs' norms, then of the cell's.
  void step(
      int64_t M, Rows<const float> h, const Kept& kept, Rows<const float> dnext, const Kept& grad,
      Rows<float> dh, Rows<float> dstoch, float* dnorm, float* scratch) const {
    const int64_t inputs = input_width(model_);
    const Rows<float> dx{scratch, inputs};
    float* rest = scratch + M * inputs;
    for (int64_t m = 0; m < M; ++m) fill(dx[m], 0, inputs);
    float* cell_norm = dnorm + 2 * inputs;
    if (model_.cell == FD_CELL_GRU) gru(M, h, kept, dnext, grad, dh, dx, cell_norm, rest);
    else block_gru(M, h, kept, dnext, grad, dh, dx, cell_norm, rest);
    input_norms(M, kept.inputs, dx, grad.inputs, dnorm);
    const bool blocks = model_.cell == FD_CELL_BLOCK_GRU;
    const float* at_stoch = grad.inputs.data + (blocks ? model_.hidden : 0);
    gemm(M, at_stoch, grad.inputs.stride, stoch_, dstoch.data, dstoch.stride);
    if (blocks) gemm(M, grad.inputs.data, grad.inputs.stride, deter_, dh.data, dh.stride, true);
  }

 private:
  void gru(
      int64_t M, Rows<const float> h, const Kept& kept, Rows<const float> dnext, const Kept& grad,
      Rows<float> dh, Rows<float> dx, float* dnorm, float* scratch) const {
    const int64_t D = model_.deter;
    const Norm norm = norm_of(model_, model_.cell_scale, model_.cell_shift);
    for (int64_t m = 0; m < M; ++m) {
      norm_row<false>(norm, kept.gates[m], scratch, 3 * D);
      apply_gates_backward(scratch, h[m], dnext[m], grad.gates[m], dh[m], D, 1);
      norm_row_backward<false>(
          norm, kept.gates[m], grad.gates[m], grad.gates[m], dnorm, dnorm + 3 * D, 3 * D);
    }
    gemm(M, grad.gates.data, grad.gates.stride, state_[0], dh.data, dh.stride, true);
    gemm(M, grad.gates.data, grad.gates.stride, input_[0], dx.data, dx.stride, true);
  }

  void block_gru(
      int64_t M, Rows<const float> h, const Kept& kept, Rows<const float> dnext, const Kept& grad,
      Rows<float> dh, Rows<float> dx, float* dnorm, float* scratch) const {
    const int64_t D = model_.deter, G = model_.blocks, width = D / G;
    const Norm norm = norm_of(model_, model_.cell_scale, nullptr);
    const Rows<float> dz{scratch, D};
    for (int64_t m = 0; m < M; ++m)
      apply_gates_backward(kept.gates[m], h[m], dnext[m], grad.gates[m], dh[m], D, G);
    for (int64_t g = 0; g < G; ++g)
      gemm(M, grad.gates.data + 3 * g * width, grad.gates.stride, gates_[g], dz.data + g * width, D);
    for (int64_t m = 0; m < M; ++m)
      norm_row_backward<true>(norm, kept.hidden[m], dz[m], grad.hidden[m], dnorm, nullptr, D);
    for (int64_t g = 0; g < G; ++g) {
      const float* hidden = grad.hidden.data + g * width;
      gemm(M, hidden, grad.hidden.stride, state_[g], dh.data + g * width, dh.stride, true);
      gemm(M, hidden, grad.hidden.stride, input_[g], dx.data, dx.stride, true);
    }
  }

  void input_norms(
      int64_t M, Rows<float> before, Rows<float> dx, Rows<float> dinputs, float* dnorm) const {
    const int64_t U = model_.hidden, inputs = input_width(model_);
    const bool blocks = model_.cell == FD_CELL_BLOCK_GRU;
    const fd_layer* layers[3] = {&model_.in_deter, &model_.in_stoch, &model_.in_action};
    for (int64_t at = 0; at < inputs; at += U) {
      const fd_layer& layer = blocks ? *layers[at / U] : model_.in_stoch;
      const Norm norm = norm_of(model_, layer.scale, layer.shift);
      float* dshift = layer.shift ? dnorm + inputs + at : nullptr;
      for (int64_t m = 0; m < M; ++m)
        norm_row_backward<true>(
            norm, before[m] + at, dx[m] + at, dinputs[m] + at, dnorm + at, dshift, U);
    }
  }

  const fd_rssm& model_;
  Packed stoch_, deter_, state_[kMaxBlocks], input_[kMaxBlocks], gates_[kMaxBlocks];
};

}  // namespace FD_ISA
}  // namespace fastdreamer

#endif
