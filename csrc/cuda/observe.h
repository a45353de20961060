// The posterior scan and its backward pass, for a team's rows over all steps.
#ifndef FASTDREAMER_CUDA_OBSERVE_H
#define FASTDREAMER_CUDA_OBSERVE_H

#include "cell.h"
#include "fastdreamer.h"

namespace fastdreamer {

constexpr int kObserveTiles = 1;  // of 16 rows in a team

struct Observe {
  Model model;
  fd_observe scan;
  Norm posterior_norm;
  const float* out_bias;
  Product by_deter, out;
  Share* shares;  // (teams, members, rows)
  SharedLayout layout;

  // The products whose weights are packed, and may stay in shared memory: body(product) for each.
  FD_EITHER template <typename Self, typename Body>
  FD_BOTH static void each_product(Self& self, const Body& body) {
    if (self.model.blocks) body(self.model.in_deter), body(self.model.gates);
    body(self.model.state), body(self.model.input), body(self.by_deter), body(self.out);
  }
  template <typename Body>
  void each_table(const Body& body) {
    body(model.stoch_table), body(model.action_table);
  }
  template <typename Compute, int MT, typename Block>
  FD_FN void run(Block& b, const Memory<Compute, MT>& memory) const;
};

// A team's rows at one step.
struct ObserveAt {
  const Model& model;
  const fd_observe& scan;
  int64_t row0, t;

  template <typename T>
  FD_FN T* at(T* data, int row, int64_t width, int64_t step) const {
    return data + ((row0 + row) * scan.T + step) * width;
  }
  template <typename T>
  FD_FN T* at(T* data, int row, int64_t width) const {
    return at(data, row, width, t);
  }
  FD_FN bool first(int row) const { return *at(scan.is_first, row, 1); }
  FD_FN const float* last_deter(int row) const {
    if (first(row)) return scan.initial_deter;
    if (t == 0) return scan.start_deter + (row0 + row) * model.deter;
    return at(scan.deter, row, model.deter, t - 1);
  }
  FD_FN const int32_t* last_index(int row) const {
    if (first(row)) return scan.initial_index;
    if (t == 0) return scan.start_index + (row0 + row) * model.stoch;
    return at(scan.index, row, model.stoch, t - 1);
  }
  // As the cell takes it: 0 at a first step, within -1..1 for blocks.
  FD_FN float action(int row, int i) const {
    const float x = at(scan.action, row, model.action)[i], size = x < 0 ? -x : x;
    return first(row) ? 0.0f : model.blocks && size > 1 ? x / size : x;
  }
  FD_FN float* inputs(int row) const { return at(scan.inputs, row, model.inputs); }
  FD_FN float* hidden(int row) const { return at(scan.hidden, row, model.deter); }
  FD_FN float* gates(int row) const { return at(scan.gates, row, 3 * model.deter); }
  FD_FN float* deter(int row) const { return at(scan.deter, row, model.deter); }
  FD_FN float* posterior(int row) const { return at(scan.posterior, row, model.hidden); }
  FD_FN float* logp(int row) const { return at(scan.logp, row, model.latent()); }
};

template <typename Compute, int MT, typename Block>
FD_FN void Observe::run(Block& b, const Memory<Compute, MT>& memory) const {
  const Model& m = model;
  const auto [row0, rows] = team_rows<MT>(b, scan.B);
  Share* mine = shares + int64_t{b.team} * b.members * Memory<Compute, MT>::kRows;
  for (int64_t t = 0; t < scan.T; ++t) {
    const ObserveAt at{m, scan, row0, t};
    cell_step<Compute, MT>(b, memory, m, rows, at, mine);

    const int padded = by_deter.padded(), stride = padded + 8;
    stage<Compute, MT>(b, memory, stride, 0, m.deter, padded, rows,
                       [&](int row, int i) { return at.deter(row)[i]; });
    b.sync();
    const Operand<Compute> deter[1] = {{memory.rows(), stride, 0, 0, &by_deter}};
    multiply<Compute, MT>(b, memory, deter, rows, [&](int row, int column, float sum) {
      at.posterior(row)[column] = sum + at.at(scan.embedded, row, m.hidden)[column];
    });
    b.team_sync();

    const int x_padded = out.padded(), x_stride = x_padded + 8;
    stage_norms<Compute, MT>(b, memory, x_stride, 0, x_padded, &posterior_norm, 1, rows,
                             [&](int row) { return at.posterior(row); });
    b.sync();
    const Operand<Compute> x[1] = {{memory.rows(), x_stride, 0, 0, &out}};
    multiply<Compute, MT>(b, memory, x, rows, [&](int row, int column, float sum) {
      at.logp(row)[column] = out_bias ? sum + out_bias[column] : sum;
    });
    by_own_latents(b, m, out, rows, [&](int row, int s) {
      float* logits = at.logp(row) + s * m.classes;
      const float* noise = at.at(scan.noise, row, m.latent()) + s * m.classes;
      const int drawn = draw(logits, noise, m.classes, m.mix, logits);
      by_lane([&](int lane, int) {
        if (lane == 0) at.at(scan.index, row, m.stoch)[s] = drawn;
      });
    });
    b.team_sync();
  }
}

}  // namespace fastdreamer

#endif
