// The posterior scan and its backward pass. Rows of a batch are independent of one another: each
// thread takes its rows through all steps, and no step waits for another thread.
#include "cell.h"
#include "parallel.h"

namespace fastdreamer {
namespace FD_ISA {
namespace {

// Views of a scan's tensors at one step, for rows from `row` on.
struct At {
  const fd_rssm& model;
  const fd_observe& scan;
  int64_t row, t;

  template <typename T>
  Rows<T> rows(T* data, int64_t width, int64_t t) const {
    return {data + (row * scan.T + t) * width, scan.T * width};
  }
  template <typename T>
  Rows<T> rows(T* data, int64_t width) const {
    return rows(data, width, t);
  }
  Kept kept() const {
    return kept(scan.inputs, scan.hidden, scan.gates);
  }
  Kept kept(float* inputs, float* hidden, float* gates) const {
    const Rows<float> none{nullptr, 0};
    return {rows(inputs, input_width(model)), hidden ? rows(hidden, model.deter) : none,
            rows(gates, 3 * model.deter)};
  }
  bool first(int64_t m) const { return scan.is_first[(row + m) * scan.T + t]; }
  const float* last_deter(int64_t m) const {
    if (first(m)) return scan.initial_deter;
    if (t == 0) return scan.start_deter + (row + m) * model.deter;
    return rows(scan.deter, model.deter, t - 1)[m];
  }
  const int32_t* last_index(int64_t m) const {
    if (first(m)) return scan.initial_index;
    if (t == 0) return scan.start_index + (row + m) * model.stoch;
    return rows(scan.index, model.stoch, t - 1)[m];
  }
};

// The previous action as the cell takes it: 0 at a first step.
void previous_action(const At& at, int64_t m, float* to) {
  const int64_t A = at.model.action;
  if (at.first(m)) fill(to, 0, A);
  else limit_action(at.model, at.rows(at.scan.action, A)[m], to);
}

void forward_rows(
    const fd_rssm& model, const fd_observe& scan, const Cell& cell, const Packed& by_deter,
    const Packed& out, int64_t begin, int64_t end) {
  const int64_t M = end - begin, D = model.deter, S = model.stoch, U = model.hidden;
  const int64_t A = model.action, latent = S * model.classes;
  const Buffer memory(cell.scratch(M) + M * (D + S + A + U + latent));
  const Rows<float> h{memory.get(), D}, action{h[M], A}, x{action[M], U}, logits{x[M], latent};
  const Rows<int32_t> index{reinterpret_cast<int32_t*>(logits[M]), S};
  float* scratch = logits[M] + M * S;
  const Norm norm = norm_of(model, model.head[0].scale, model.head[0].shift);
  for (int64_t t = 0; t < scan.T; ++t) {
    const At at{model, scan, begin, t};
    for (int64_t m = 0; m < M; ++m) {
      copy(at.last_deter(m), h[m], D);
      for (int64_t s = 0; s < S; ++s) index[m][s] = at.last_index(m)[s];
      previous_action(at, m, action[m]);
    }
    const Rows<float> deter = at.rows(scan.deter, D), before = at.rows(scan.posterior, U);
    cell.step(M, {h.data, D}, {index.data, S}, {action.data, A}, at.kept(), deter, scratch);
    for (int64_t m = 0; m < M; ++m) copy(at.rows(scan.embedded, U)[m], before[m], U);
    gemm(M, deter.data, deter.stride, by_deter, before.data, before.stride, true);
    for (int64_t m = 0; m < M; ++m) norm_row<true>(norm, before[m], x[m], U);
    start_rows(logits, model.head[1].bias, M, latent);
    gemm(M, x.data, U, out, logits.data, latent, true);
    draw_latents(
        M, S, model.classes, model.mix, {logits.data, latent}, at.rows(scan.noise, latent),
        at.rows(scan.logp, latent), at.rows(scan.index, S));
  }
}

// What the backward pass takes from step to step, and its packed weights.
struct Backward {
  const fd_rssm& model;
  const fd_observe& scan;
  const fd_observe_grad& grad;
  CellGrad cell;
  Packed by_deter, out;
};

// Gradient of the state and the classes of step t (M rows), both arriving with what later steps
// add and leaving as what step t - 1 gets.
void step_backward(
    const Backward& pass, const At& at, int64_t M, Rows<float> carry, Rows<float> dstoch,
    float* dnorm, float* dinitial, float* scratch) {
  const fd_rssm& model = pass.model;
  const int64_t D = model.deter, K = model.classes, U = model.hidden, latent = model.stoch * K;
  const Rows<float> dh{scratch, D}, dx{dh[M], U}, h{dx[M], D};
  float* rest = h[M];
  const Rows<float> dlogits = at.rows(pass.grad.dlogits, latent);
  for (int64_t m = 0; m < M; ++m) {
    const float* logp = at.rows<const float>(pass.scan.logp, latent)[m];
    add(at.rows(pass.grad.dstoch, latent)[m], dstoch[m], latent);
    by_vectors(latent, [&](int64_t i, int c) {  // straight through the sample to exp(logp)
      const Vec dlogp = load_some(at.rows(pass.grad.dlogp, latent)[m] + i, c);
      const Vec p = exp(load_some(logp + i, c));
      store_some(dlogits[m] + i, dlogp + load_some(dstoch[m] + i, c) * p, c);
    });
    unimix_rows_backward(dlogits[m], logp, dlogits[m], 0, model.stoch, K, model.mix);
    add(at.rows(pass.grad.ddeter, D)[m], carry[m], D);
    copy(at.last_deter(m), h[m], D);
  }
  gemm(M, dlogits.data, dlogits.stride, pass.out, dx.data, U);
  const Norm norm = norm_of(model, model.head[0].scale, model.head[0].shift);
  float* posterior_norm = dnorm + 2 * (input_width(model) + cell_width(gru_of(model)));
  const Rows<float> dbefore = at.rows(pass.grad.dposterior, U);
  for (int64_t m = 0; m < M; ++m)
    norm_row_backward<true>(
        norm, at.rows(pass.scan.posterior, U)[m], dx[m], dbefore[m], posterior_norm,
        norm.shift ? posterior_norm + U : nullptr, U);
  gemm(M, dbefore.data, dbefore.stride, pass.by_deter, carry.data, D, true);
  const Kept grad = at.kept(pass.grad.dinputs, pass.grad.dhidden, pass.grad.dgates);
  pass.cell.step(
      M, {h.data, D}, at.kept(), {carry.data, D}, grad, dh, dstoch, dnorm, rest);
  for (int64_t m = 0; m < M; ++m) {
    if (at.first(m)) {
      add(dh[m], dinitial, D);
      fill(dh[m], 0, D);
      fill(dstoch[m], 0, latent);
    }
    copy(dh[m], carry[m], D);
  }
}

int64_t norm_size(const fd_rssm& model) {
  return 2 * (input_width(model) + cell_width(gru_of(model)) + model.hidden);
}

// sums: norm_size for dnorm, then D for dinitial, both starting at 0.
void backward_rows(const Backward& pass, int64_t begin, int64_t end, float* sums) {
  const fd_rssm& model = pass.model;
  const int64_t M = end - begin, D = model.deter, latent = model.stoch * model.classes;
  const Buffer memory(pass.cell.scratch(M) + M * (3 * D + model.hidden + latent));
  const Rows<float> carry{memory.get(), D}, dstoch{carry[M], latent};
  fill(carry.data, 0, M * (D + latent));
  for (int64_t t = pass.scan.T - 1; t >= 0; --t)
    step_backward(
        pass, {model, pass.scan, begin, t}, M, carry, dstoch, sums, sums + norm_size(model),
        dstoch[M]);
}

}  // namespace

void rssm_observe(const fd_rssm& model, const fd_observe& scan) {
  const Cell cell(model);
  const Packed by_deter = pack_transposed(model.head[0]), out = pack_transposed(model.head[1]);
  parallel_ranges(scan.B, 1, [&](int64_t begin, int64_t end) {
    const TileScope tiles;
    forward_rows(model, scan, cell, by_deter, out, begin, end);
  });
}

void rssm_observe_backward(
    const fd_rssm& model, const fd_observe& scan, const fd_observe_grad& grad) {
  const Backward pass{model, scan, grad, CellGrad(model), pack(model.head[0]), pack(model.head[1])};
  const int64_t size = norm_size(model) + model.deter, parts = thread_count();
  const Buffer sums(parts * size);  // one for each range of rows, added up in their order
  fill(sums.get(), 0, parts * size);
  const int64_t step = (scan.B + parts - 1) / parts;
  parallel_ranges(scan.B, 1, [&](int64_t begin, int64_t end) {
    const TileScope tiles;
    backward_rows(pass, begin, end, sums.get() + begin / step * size);
  });
  fill(grad.dnorm, 0, norm_size(model));
  fill(grad.dinitial, 0, model.deter);
  for (int64_t i = 0; i < parts; ++i) {
    add(sums.get() + i * size, grad.dnorm, norm_size(model));
    add(sums.get() + i * size + norm_size(model), grad.dinitial, model.deter);
  }
}

}  // namespace FD_ISA
}  // namespace fastdreamer
