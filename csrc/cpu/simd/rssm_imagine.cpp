// The imagined rollout with the policy inside. Rows are independent of one another: a tile of
// them goes through all steps before the next one starts.
#include "cell.h"
#include "parallel.h"

namespace fastdreamer {
namespace FD_ISA {
namespace {

// Rows of a tile: few, so that its values stay in a core's second cache, and more where the weights
// do not fit in there anyway and every tile fetches them again; but every thread has its tile.
int64_t rows_of_tile(const fd_rssm& model, int64_t N) {
  constexpr int64_t kRows = 48, kLarge = 1 << 19;
  const fd_gru cell = gru_of(model);
  const int64_t D = cell.deter, U = cell.inputs, share = (N + thread_count() - 1) / thread_count();
  const bool gru = cell.cell == FD_CELL_GRU;
  const int64_t weights = gru ? 3 * D * (D + U) : D * (4 * D / cell.blocks + U);
  if (weights <= kLarge || share <= kRows) return kRows;
  return share < kBlockRows ? share : kBlockRows;
}

// Layers behind one another, packed.
class Stack {
 public:
  Stack(const fd_rssm& model, const fd_layer* layers, int64_t count, int64_t skip)
      : model_(model), layers_(layers), count_(count) {
    for (int64_t i = skip; i < count; ++i) packed_[i] = pack_transposed(layers[i]);
  }
  int64_t width() const {
    int64_t widest = 0;
    for (int64_t i = 0; i < count_; ++i)
      if (layers_[i].outputs > widest) widest = layers_[i].outputs;
    return widest;
  }
  void product(int64_t layer, int64_t M, Rows<const float> x, Rows<float> y) const {
    start_rows(y, layers_[layer].bias, M, layers_[layer].outputs);
    gemm(M, x.data, x.stride, packed_[layer], y.data, y.stride, true);
  }
  void activate(int64_t layer, int64_t M, Rows<float> x) const {
    const fd_layer& l = layers_[layer];
    if (!l.scale) return;
    const Norm norm = norm_of(model_, l.scale, l.shift);
    norm_each_row<true>(norm, M, x.data, x.stride, x.data, x.stride, l.outputs);
  }

 private:
  const fd_rssm& model_;
  const fd_layer* layers_;
  int64_t count_;
  Packed packed_[kMaxLayers];
};

class Rollout {
 public:
  Rollout(const fd_rssm& model, const fd_imagine& args)
      : model_(model), args_(args), latent_(model.stoch * model.classes), cell_(model),
        prior_(model, model.head, model.head_layers, 0),
        policy_(model, args.policy, args.policy_layers, 1) {
    const fd_layer& first = args.policy[0];
    const int64_t at_deter = args.deter_first ? 0 : latent_;
    const int64_t at_stoch = args.deter_first ? model.deter : 0;
    by_deter_ = Packed(first.weight + at_deter, model.deter, first.outputs, 1, first.stride);
    by_stoch_ = Table(first.weight + at_stoch, latent_, first.outputs, first.stride);
    for (int64_t i = 0, head = 0; i < args.parts; ++i)
      for (int64_t n = args.discrete[i] ? 1 : 2; n > 0; --n, ++head)
        heads_[head] = pack_transposed(args.heads[head]);
  }

  void run(int64_t begin, int64_t end) const {
    const int64_t M = end - begin, D = model_.deter, S = model_.stoch, A = model_.action;
    const int64_t wide = prior_.width() > policy_.width() ? prior_.width() : policy_.width();
    const int64_t width = wide > 2 * A ? wide : 2 * A;
    const Buffer memory(cell_.scratch(M) + M * (input_width(model_) + D + 2 * width + A));
    const Rows<float> inputs{memory.get(), input_width(model_)}, hidden{inputs[M], D};
    const Rows<float> none{nullptr, 0}, x{hidden[M], width}, y{x[M], width};
    float* scratch = y[M];
    const int64_t steps = args_.H + 1, F = D + latent_;
    for (int64_t t = 0; t < steps; ++t) {
      const Rows<float> feat{args_.feat + (begin * steps + t) * F, steps * F};
      const Rows<float> deter{feat.data + (args_.deter_first ? 0 : latent_), feat.stride};
      const Rows<float> stoch{feat.data + (args_.deter_first ? D : 0), feat.stride};
      const Rows<int32_t> index{args_.index + (begin * steps + t) * S, steps * S};
      const Rows<float> action{args_.action + (begin * steps + t) * A, steps * A};
      if (t == 0) {
        start(begin, M, deter, index);
      } else {
        const Rows<const float> old{deter.data - F, deter.stride};
        const Rows<const int32_t> drawn{index.data - S, index.stride};
        const Rows<float> taken{scratch, A};
        for (int64_t m = 0; m < M; ++m) limit_action(model_, action[m] - A, taken[m]);
        cell_.step(
            M, old, drawn, {taken.data, A}, {inputs, hidden, none}, deter, scratch + M * A);
        draw_prior(begin, M, t - 1, deter, index, x, y);
      }
      for (int64_t m = 0; m < M; ++m) write_one_hot(model_, index[m], stoch[m]);
      act(begin, M, t, deter, index, action, x, y);
    }
    end_streams();
  }

 private:
  void start(int64_t begin, int64_t M, Rows<float> deter, Rows<int32_t> index) const {
    for (int64_t m = 0; m < M; ++m) {
      copy(args_.start_deter + (begin + m) * model_.deter, deter[m], model_.deter);
      for (int64_t s = 0; s < model_.stoch; ++s)
        index[m][s] = args_.start_index[(begin + m) * model_.stoch + s];
    }
  }

  void draw_prior(
      int64_t begin, int64_t M, int64_t t, Rows<float> deter, Rows<int32_t> index, Rows<float> x,
      Rows<float> y) const {
    Rows<const float> from{deter.data, deter.stride};
    for (int64_t i = 0; i < model_.head_layers; ++i) {
      const Rows<float> to{(i % 2 ? y : x).data, model_.head[i].outputs};
      prior_.product(i, M, from, to);
      prior_.activate(i, M, to);
      from = {to.data, to.stride};
    }
    draw_latents(
        M, model_.stoch, model_.classes, model_.mix, from,
        {args_.noise + (begin * args_.H + t) * latent_, args_.H * latent_}, {nullptr, 0}, index);
  }

  void act(
      int64_t begin, int64_t M, int64_t t, Rows<float> deter, Rows<int32_t> index,
      Rows<float> action, Rows<float> x, Rows<float> y) const {
    const fd_layer& first = args_.policy[0];
    start_rows(x, first.bias, M, first.outputs);
    for (int64_t m = 0; m < M; ++m) by_stoch_.gather(index[m], model_.stoch, model_.classes, x[m]);
    gemm(M, deter.data, deter.stride, by_deter_, x.data, x.stride, true);
    float *kept = args_.kept, *output = args_.hidden;
    for (int64_t i = 0; i < args_.policy_layers; ++i) {
      if (i > 0) {
        policy_.product(i, M, {x.data, x.stride}, y);
        const Rows<float> swap = x;
        x = y, y = swap;
      }
      keep(begin, M, t, x, i, kept);
      policy_.activate(i, M, x);
      keep(begin, M, t, x, i, i + 1 < args_.policy_layers ? kept : output);
    }
    for (int64_t part = 0, head = 0, at = 0; part < args_.parts; at += args_.part_sizes[part++]) {
      const int64_t n = args_.part_sizes[part];
      const bool discrete = args_.discrete[part];
      const Rows<float> raw{y.data, discrete ? n : 2 * n};
      product(head++, M, x, raw);
      if (!discrete) product(head++, M, x, {raw.data + n, raw.stride});
      else unimix_rows(raw.data, raw.data, 0, M, n, args_.policy_mix);
      for (int64_t m = 0; m < M; ++m) {
        const float* noise =
            args_.action_noise + ((begin + m) * (args_.H + 1) + t) * model_.action + at;
        if (discrete) draw_action(raw[m], noise, action[m] + at, n);
        else normal_action(raw[m], noise, action[m] + at, n);
      }
    }
  }

  void keep(
      int64_t begin, int64_t M, int64_t t, Rows<float> x, int64_t layer, float*& kept) const {
    const int64_t steps = args_.H + 1, outputs = args_.policy[layer].outputs;
    const Rows<const float> rows{x.data, x.stride};
    keep_rows(M, rows, outputs, begin * steps + t, steps, args_.N * steps, kept);
  }

  void product(int64_t head, int64_t M, Rows<float> x, Rows<float> to) const {
    start_rows(to, args_.heads[head].bias, M, args_.heads[head].outputs);
    gemm(M, x.data, x.stride, heads_[head], to.data, to.stride, true);
  }

  const fd_rssm& model_;
  const fd_imagine& args_;
  int64_t latent_;
  Cell cell_;
  Stack prior_, policy_;
  Packed by_deter_, heads_[kMaxHeads];
  Table by_stoch_;
};

}  // namespace

void rssm_imagine(const fd_rssm& model, const fd_imagine& args) {
  const Rollout rollout(model, args);
  const int64_t rows = rows_of_tile(model, args.N);
  parallel_for((args.N + rows - 1) / rows, [&](int64_t tile) {
    const TileScope tiles;
    const int64_t end = (tile + 1) * rows;
    rollout.run(tile * rows, end < args.N ? end : args.N);
  });
}

}  // namespace FD_ISA
}  // namespace fastdreamer
