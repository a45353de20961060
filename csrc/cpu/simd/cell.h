// The recurrent cells of rssm.h's models with their input layers: forward, backward, and what they
// keep in between.
#ifndef FASTDREAMER_CPU_SIMD_CELL_H
#define FASTDREAMER_CPU_SIMD_CELL_H

#include "gates.h"
#include "rssm.h"

namespace fastdreamer {
namespace FD_ISA {

// What a step keeps for its backward pass; see fd_observe.
struct Kept {
  Rows<float> inputs, hidden, gates;
};

// The weights of a cell, packed for the forward pass.
class Cell {
 public:
  explicit Cell(const fd_rssm& model)
      : model_(model),
        stoch_(model.in_stoch.weight, model.stoch * model.classes, model.hidden, model.in_stoch.stride),
        action_(pack_transposed(model.in_action)),
        gates_(gru_of(model)) {
    if (model.cell == FD_CELL_BLOCK_GRU) deter_ = pack_transposed(model.in_deter);
  }

  // Floats of scratch for M rows.
  int64_t scratch(int64_t M) const { return M * input_width(model_) + gates_.scratch(M); }

  // next (M, D) from h (M, D), drawn classes (M, S) and action (M, A).
  void step(
      int64_t M, Rows<const float> h, Rows<const int32_t> index, Rows<const float> action,
      const Kept& kept, Rows<float> next, float* scratch) const {
    const Rows<float> x{scratch, input_width(model_)};
    inputs(M, h, index, action, kept.inputs, x);
    gates_.step(M, h, {x.data, x.stride}, kept.hidden, kept.gates, next, x[M]);
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
    const auto norm = [&](const fd_layer& layer, int64_t at) {
      norm_each_row<true>(
          norm_of(model, layer.scale, layer.shift), M, before.data + at, before.stride,
          x.data + at, x.stride, U);
    };
    norm(model.in_stoch, at_stoch);
    if (!blocks) return;
    norm(model.in_deter, 0);
    norm(model.in_action, at_action);
  }

  const fd_rssm& model_;
  Table stoch_;
  Packed action_, deter_;
  Gates gates_;
};

// The weights of a cell, packed for the backward pass.
class CellGrad {
 public:
  explicit CellGrad(const fd_rssm& model)
      : model_(model),
        stoch_(pack(model.in_stoch)),
        gates_(gru_of(model)) {
    if (model.cell == FD_CELL_BLOCK_GRU) deter_ = pack(model.in_deter);
  }

  int64_t scratch(int64_t M) const { return M * input_width(model_) + gates_.scratch(M); }

  // Gradients of what a step kept, and of its state and classes, from dnext (M, D).
  // dnorm: scale and shift of the inputs' norms, then of the cell's.
  void step(
      int64_t M, Rows<const float> h, const Kept& kept, Rows<const float> dnext, const Kept& grad,
      Rows<float> dh, Rows<float> dstoch, float* dnorm, float* scratch) const {
    const int64_t inputs = input_width(model_);
    const Rows<float> dx{scratch, inputs};
    fill(dx.data, 0, M * inputs);
    gates_.step(
        M, h, {kept.hidden.data, kept.hidden.stride}, {kept.gates.data, kept.gates.stride}, dnext,
        grad.hidden, grad.gates, dh, dx, dnorm + 2 * inputs, dx[M]);
    input_norms(M, kept.inputs, dx, grad.inputs, dnorm);
    const bool blocks = model_.cell == FD_CELL_BLOCK_GRU;
    const float* at_stoch = grad.inputs.data + (blocks ? model_.hidden : 0);
    gemm(M, at_stoch, grad.inputs.stride, stoch_, dstoch.data, dstoch.stride);
    if (blocks) gemm(M, grad.inputs.data, grad.inputs.stride, deter_, dh.data, dh.stride, true);
  }

 private:
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
  Packed stoch_, deter_;
  GatesGrad gates_;
};

}  // namespace FD_ISA
}  // namespace fastdreamer

#endif
