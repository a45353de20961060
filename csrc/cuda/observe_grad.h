// The backward pass of the posterior scan: the steps of observe.h in reverse, with the transposed
// weights. A team's barrier ends each phase.
#ifndef FASTDREAMER_CUDA_OBSERVE_GRAD_H
#define FASTDREAMER_CUDA_OBSERVE_GRAD_H

#include "observe.h"

namespace fastdreamer {

// Where the norms' parts of fd_observe_grad.dnorm begin: scales, and behind each its shifts.
struct NormGradients {
  int inputs, cell, posterior, size;
};

struct ObserveGrad {
  Model model;  // without weights
  fd_observe scan;
  fd_observe_grad grad;
  Norm posterior_norm;
  NormGradients norms;
  Product out, by_deter;     // of the posterior's layers
  Product gates;             // blocks: to the hidden layer
  Product state, input;      // of the hidden layer, or the gates
  Product stoch, in_deter;   // of the input layers; in_deter: blocks
  // Of all rows and steps, (rows, T, 5): the norms of the inputs, the cell, the posterior.
  Moments* moments;
  // Of each team, for its rows.
  float *carry, *dstoch;                       // (rows, D) and (rows, S K) from the step behind
  float *dposterior, *dcell, *dinputs;         // gradients behind the norms, before their own
  Slope *posterior_slopes, *cell_slopes, *input_slopes;  // (members, rows), the last three times
  float* dnorm;     // (norms.size,)
  float* dinitial;  // (D,)
  SharedLayout layout;

  static constexpr int kCellMoments = 3, kPosteriorMoments = 4, kMoments = 5;

  FD_EITHER template <typename Self, typename Body>
  FD_BOTH static void each_product(Self& self, const Body& body) {
    if (self.model.blocks) body(self.gates), body(self.in_deter);
    body(self.state), body(self.input), body(self.by_deter), body(self.out), body(self.stoch);
  }
  template <typename Body>
  void each_table(const Body&) {}
  template <typename Compute, int MT, typename Block>
  FD_FN void run(Block& b, const Memory<Compute, MT>& memory) const;
};

// One team's part of the arguments, and its work at one step.
template <typename Compute, int MT, typename Block>
struct StepGrad {
  static constexpr int kRows = Memory<Compute, MT>::kRows;
  Block& b;
  const Memory<Compute, MT>& memory;
  const ObserveGrad& args;
  const Model& m;
  ObserveAt at;
  int rows;
  float *carry, *dstoch, *dposterior, *dcell, *dinputs, *dnorm, *dinitial;
  Slope *posterior_slopes, *cell_slopes, *input_slopes;

  FD_FN StepGrad(Block& block, const Memory<Compute, MT>& mem, const ObserveGrad& a)
      : b(block), memory(mem), args(a), m(a.model), at{a.model, a.scan, 0, 0} {
    const TeamRows team = team_rows<MT>(b, args.scan.B);
    at.row0 = team.first, rows = team.count;
    const int64_t first = int64_t{b.team} * kRows;
    carry = args.carry + first * m.deter;
    dstoch = args.dstoch + first * m.latent();
    dposterior = args.dposterior + first * m.hidden;
    dcell = args.dcell + first * args.model.cell_norm.width;
    dinputs = args.dinputs + first * m.inputs;
    posterior_slopes = args.posterior_slopes + first * b.members;
    cell_slopes = args.cell_slopes + first * b.members;
    input_slopes = args.input_slopes + 3 * first * b.members;
    dnorm = args.dnorm + int64_t{b.team} * args.norms.size;
    dinitial = args.dinitial + int64_t{b.team} * m.deter;
  }

  FD_FN int input_norms() const { return m.blocks ? 3 : 1; }
  FD_FN const Moments& moments(int row, int which) const {
    return at.at(args.moments, row, ObserveGrad::kMoments)[which];
  }
  FD_FN const float* before_cell(int row) const { return m.blocks ? at.hidden(row) : at.gates(row); }
  FD_FN float* shared_slopes() const { return memory.moments(); }

  // What does not depend on the scan, and zeros to start from.
  FD_FN void prepare() {
    const int64_t steps = args.scan.T;
    for (int64_t i = b.member * b.warps() + b.warp(); i < rows * steps; i += b.members * b.warps()) {
      const int row = static_cast<int>(i / steps);
      at.t = i % steps;
      Moments all[ObserveGrad::kMoments] = {};
      for (int n = 0; n < input_norms(); ++n)
        all[n] = row_moments(m.in_norms[n], at.inputs(row) + n * m.hidden);
      all[ObserveGrad::kCellMoments] = row_moments(m.cell_norm, before_cell(row));
      all[ObserveGrad::kPosteriorMoments] = row_moments(args.posterior_norm, at.posterior(row));
      Moments* to = at.at(args.moments, row, ObserveGrad::kMoments);
      by_lane([&](int lane, int) {
        if (lane == 0)
          for (int n = 0; n < ObserveGrad::kMoments; ++n) to[n] = all[n];
      });
    }
    zero(carry, kRows * m.deter);
    zero(dstoch, kRows * m.latent());
    zero(dnorm, args.norms.size);
    zero(dinitial, m.deter);
    b.team_sync();
  }
  FD_FN void zero(float* x, int n) {
    for (int i = b.member * b.threads() + b.thread(); i < n; i += b.members * b.threads()) x[i] = 0;
  }

  // The logits' gradient, of the block's own latents.
  FD_FN void logits() {
    const int K = m.classes, latent = m.latent();
    by_own_latents(b, m, args.stoch, rows, [&](int row, int s) {
      const int i = s * K;
      draw_gradient(at.logp(row) + i, at.at(args.grad.dlogp, row, latent) + i,
                    at.at(args.grad.dstoch, row, latent) + i, dstoch + row * latent + i, K, m.mix,
                    at.at(args.grad.dlogits, row, latent) + i);
    });
    b.team_sync();
  }

  // Through the posterior's logits, up to the norm of its hidden layer.
  FD_FN void posterior() {
    const int padded = args.out.padded(), stride = padded + 8, U = m.hidden, latent = m.latent();
    stage<Compute, MT>(b, memory, stride, 0, latent, padded, rows, [&](int row, int i) {
      return at.at(args.grad.dlogits, row, latent)[i];
    });
    b.sync();
    const Operand<Compute> operands[1] = {{memory.rows(), stride, 0, 0, &args.out}};
    multiply<Compute, MT>(b, memory, operands, rows, [&](int row, int column, float sum) {
      dposterior[row * U + column] = silu_gradient(
          args.posterior_norm, moments(row, ObserveGrad::kPosteriorMoments), at.posterior(row)[column],
          sum, column);
    });
    float* to = dnorm + args.norms.posterior;
    share_slopes(
        b, args.out, args.posterior_norm, 0, rows, [&](int row) { return at.posterior(row); },
        [&](int row) { return dposterior + row * U; },
        [&](int row) { return moments(row, ObserveGrad::kPosteriorMoments); },
        posterior_slopes + b.member * kRows, to, to + U);
    b.team_sync();
  }

  // Through that norm and layer to the state, and through the gates.
  FD_FN void gates() {
    const int padded = args.by_deter.padded(), stride = padded + 8, U = m.hidden, D = m.deter;
    Slope* slopes = reinterpret_cast<Slope*>(shared_slopes());
    join_slopes(b, rows, posterior_slopes, kRows, slopes);
    stage<Compute, MT>(b, memory, stride, 0, U, padded, rows, [&](int row, int i) {
      const float d = norm_gradient(
          args.posterior_norm, moments(row, ObserveGrad::kPosteriorMoments), slopes[row],
          at.posterior(row)[i], dposterior[row * U + i], i);
      if (row % b.members == b.member) at.at(args.grad.dposterior, row, U)[i] = d;
      return d;
    });
    b.sync();
    const Operand<Compute> operands[1] = {{memory.rows(), stride, 0, 0, &args.by_deter}};
    multiply<Compute, MT>(b, memory, operands, rows, [&](int row, int column, float sum) {
      carry[row * D + column] += sum + at.at(args.grad.ddeter, row, D)[column];
    });
    by_own(b, m.units, rows, [&](int row, int column) {
      const GateColumns c = gate_columns(m.units, column);
      const float* raw = at.gates(row);
      const Moments& norm = moments(row, ObserveGrad::kCellMoments);
      const auto gate = [&](int part) {
        const int i = c.first + part * c.apart;
        return m.blocks ? raw[i] : normalise(m.cell_norm, norm, raw[i], i);
      };
      const float r = sigmoid(gate(0)), cand = gate(1), u = sigmoid(gate(2) - 1.0f);
      const float value = tanhf(r * cand), d = carry[row * D + column];
      const float inner = d * u * (1.0f - value * value);
      float* to = m.blocks ? at.at(args.grad.dgates, row, 3 * D) : dcell + row * 3 * D;
      to[c.first] = inner * cand * r * (1.0f - r);
      to[c.first + c.apart] = inner * r;
      to[c.first + 2 * c.apart] = d * (value - at.last_deter(row)[column]) * u * (1.0f - u);
      carry[row * D + column] = d * (1.0f - u);
    });
    if (!m.blocks) {
      b.sync();
      share_cell_slopes(m.state, 3 * D);
    }
    b.team_sync();
  }

  // columns: shared out like those of the gates, or of the hidden layer.
  FD_FN void share_cell_slopes(const Product& columns, int width) {
    float* to = dnorm + args.norms.cell;
    share_slopes(
        b, columns, m.cell_norm, 0, rows, [&](int row) { return before_cell(row); },
        [&](int row) { return dcell + row * width; },
        [&](int row) { return moments(row, ObserveGrad::kCellMoments); },
        cell_slopes + b.member * kRows, to, to + width);
  }

  // Blocks: through the gates' weights, up to the norm of the hidden layer.
  FD_FN void hidden() {
    const int D = m.deter, stride = m.most_groups * args.gates.padded() + 8;
    const int first = stage_groups<Compute, MT>(b, memory, stride, args.gates, rows, [&](int row, int i) {
      return at.at(args.grad.dgates, row, 3 * D)[i];
    });
    b.sync();
    const Operand<Compute> operands[1] = {
        {memory.rows(), stride, args.gates.padded(), first, &args.gates}};
    multiply<Compute, MT>(b, memory, operands, rows, [&](int row, int column, float sum) {
      dcell[row * D + column] = silu_gradient(
          m.cell_norm, moments(row, ObserveGrad::kCellMoments), at.hidden(row)[column], sum, column);
    });
    share_cell_slopes(args.gates, D);
    b.team_sync();
  }

  // Through the cell's norm and first weights, to the state and up to the inputs' norms.
  FD_FN void cell() {
    const int U = m.hidden, width = m.cell_norm.width;
    const int padded = args.input.padded(), stride = padded + 8;
    Slope* slopes = reinterpret_cast<Slope*>(shared_slopes());
    float* to = m.blocks ? args.grad.dhidden : args.grad.dgates;
    join_slopes(b, rows, cell_slopes, kRows, slopes);
    stage<Compute, MT>(b, memory, stride, 0, width, padded, rows, [&](int row, int i) {
      const float d = norm_gradient(
          m.cell_norm, moments(row, ObserveGrad::kCellMoments), slopes[row], before_cell(row)[i],
          dcell[row * width + i], i);
      if (row % b.members == b.member) at.at(to, row, width)[i] = d;
      return d;
    });
    b.sync();
    const Operand<Compute> all[1] = {{memory.rows(), stride, 0, 0, &args.input}};
    multiply<Compute, MT>(b, memory, all, rows, [&](int row, int column, float sum) {
      const int n = column / U;
      dinputs[row * m.inputs + column] =
          silu_gradient(m.in_norms[n], moments(row, n), at.inputs(row)[column], sum, column % U);
    });
    for (int n = 0; n < input_norms(); ++n) {
      float* scale = dnorm + args.norms.inputs + n * U;
      share_slopes(
          b, args.input, m.in_norms[n], n * U, rows, [&](int row) { return at.inputs(row); },
          [&](int row) { return dinputs + row * m.inputs; },
          [&](int row) { return moments(row, n); },
          input_slopes + (n * b.members + b.member) * kRows, scale, scale + m.inputs);
    }
    state(stride);
    b.team_sync();
  }
  FD_FN void state(int stride) {
    const int D = m.deter;
    const auto add = [&](int row, int column, float sum) { carry[row * D + column] += sum; };
    if (!m.blocks) {
      const Operand<Compute> operands[1] = {{memory.rows(), stride, 0, 0, &args.state}};
      multiply<Compute, MT>(b, memory, operands, rows, add);
      return;
    }
    // Of each group only its own; staged anew, as its padding differs from that of all at once.
    const int padded = args.state.padded(), apart = m.most_groups * padded + 8;
    Slope* slopes = reinterpret_cast<Slope*>(shared_slopes());
    const int first = stage_groups<Compute, MT>(b, memory, apart, args.state, rows, [&](int row, int i) {
      return norm_gradient(
          m.cell_norm, moments(row, ObserveGrad::kCellMoments), slopes[row], at.hidden(row)[i],
          dcell[row * D + i], i);
    });
    b.sync();
    const Operand<Compute> operands[1] = {{memory.rows(), apart, padded, first, &args.state}};
    multiply<Compute, MT>(b, memory, operands, rows, add);
  }

  // Through the input layers' norms and weights, to the last state and its latents.
  FD_FN void inputs() {
    const int U = m.hidden, D = m.deter, latent = m.latent();
    const int padded = args.stoch.padded(), stride = input_norms() * padded + 8;
    Slope* slopes = reinterpret_cast<Slope*>(shared_slopes());
    for (int n = 0; n < input_norms(); ++n)
      join_slopes(b, rows, input_slopes + n * b.members * kRows, kRows, slopes + n * kRows);
    for (int n = 0; n < input_norms(); ++n)
      stage<Compute, MT>(b, memory, stride, n * padded, U, padded, rows, [&](int row, int i) {
        const int column = n * U + i;
        const float d = norm_gradient(
            m.in_norms[n], moments(row, n), slopes[n * kRows + row], at.inputs(row)[column],
            dinputs[row * m.inputs + column], i);
        if (row % b.members == b.member) at.at(args.grad.dinputs, row, m.inputs)[column] = d;
        return d;
      });
    b.sync();
    const Operand<Compute> stoch[1] = {
        {memory.rows() + (m.blocks ? padded : 0), stride, 0, 0, &args.stoch}};
    multiply<Compute, MT>(b, memory, stoch, rows, [&](int row, int column, float sum) {
      dstoch[row * latent + column] = at.first(row) ? 0.0f : sum;
    });
    if (m.blocks) {
      const Operand<Compute> deter[1] = {{memory.rows(), stride, 0, 0, &args.in_deter}};
      multiply<Compute, MT>(b, memory, deter, rows, [&](int row, int column, float sum) {
        carry[row * D + column] += sum;
      });
    }
    by_own(b, m.units, 1, [&](int, int column) {
      for (int row = 0; row < rows; ++row)
        if (at.first(row)) {
          dinitial[column] += carry[row * D + column];
          carry[row * D + column] = 0;
        }
    });
  }
};

template <typename Compute, int MT, typename Block>
FD_FN void ObserveGrad::run(Block& b, const Memory<Compute, MT>& memory) const {
  StepGrad<Compute, MT, Block> step(b, memory, *this);
  step.prepare();
  for (int64_t t = scan.T - 1; t >= 0; --t) {
    step.at.t = t;
    step.logits();
    step.posterior();
    step.gates();
    if (model.blocks) step.hidden();
    step.cell();
    step.inputs();
  }
}

}  // namespace fastdreamer

#endif
