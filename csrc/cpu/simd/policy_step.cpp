// One policy step for a few rows, on the weights as they lie: packing them would cost more than the
// products. What is left is reading them once, a row of W for an output, with several rows of x.
#include "cell.h"
#include "parallel.h"

namespace fastdreamer {
namespace FD_ISA {
namespace {

constexpr int kRows = kLanes == 16 ? 4 : 3;  // at once: their sums stay in registers
constexpr int kSide = 4;                     // outputs, or vectors of them, at once
constexpr int64_t kGrain = 128 * 1024;       // multiply-adds that are worth another thread

static inline int64_t grain(int64_t work) { return kGrain / (work + 1) + 1; }

static inline float total(Vec x) {
  typedef float Half __attribute__((vector_size(2 * kLanes)));
  Half low, high;
  __builtin_memcpy(&low, &x, sizeof(Half));
  __builtin_memcpy(&high, reinterpret_cast<const char*>(&x) + sizeof(Half), sizeof(Half));
  low += high;
  float sum = 0;
  for (int i = 0; i < kLanes / 2; ++i) sum += low[i];
  return sum;
}

// y (rows, outs) += x (rows, K) W^T, with W (outs, K).
template <int rows, int outs>
static inline void dots(
    int64_t K, Rows<const float> x, const float* w, int64_t stride, Rows<float> y) {
  Vec sums[rows][outs] = {};
  int64_t k = 0;
  for (; k + kLanes <= K; k += kLanes)
    for (int o = 0; o < outs; ++o) {
      const Vec b = load(w + o * stride + k);
      for (int m = 0; m < rows; ++m) sums[m][o] += load(x[m] + k) * b;
    }
  for (int m = 0; m < rows; ++m)
    for (int o = 0; o < outs; ++o) {
      float sum = total(sums[m][o]);
      for (int64_t i = k; i < K; ++i) sum += x[m][i] * w[o * stride + i];
      y[m][o] += sum;
    }
}

// y (rows, vectors kLanes) += x (rows, K) B, with B (K, ...); of the last vector only `count`.
template <int rows, int vectors>
static inline void columns(
    int64_t K, Rows<const float> x, const float* b, int64_t stride, Rows<float> y, int count) {
  Vec sums[rows][vectors] = {};
  for (int64_t k = 0; k < K; ++k)
    for (int v = 0; v < vectors; ++v) {
      const Vec row = load_some(b + k * stride + v * kLanes, count);
      for (int m = 0; m < rows; ++m) sums[m][v] += broadcast(x[m][k]) * row;
    }
  for (int m = 0; m < rows; ++m)
    for (int v = 0; v < vectors; ++v) {
      float* to = y[m] + v * kLanes;
      store_some(to, load_some(to, count) + sums[m][v], count);
    }
}

// Calls body<number of rows>(first row) for kRows of M rows at a time, and for the rest.
template <typename Body>
static inline void by_rows(int64_t M, const Body& body) {
  int64_t m = 0;
  for (; m + kRows <= M; m += kRows) body.template operator()<kRows>(m);
  if (M - m == 3) body.template operator()<3>(m);
  if (M - m == 2) body.template operator()<2>(m);
  if (M - m == 1) body.template operator()<1>(m);
}

struct Dots {
  int64_t K, stride;
  Rows<const float> x;
  const float* w;
  Rows<float> y;
  int64_t outs;
  template <int rows>
  void operator()(int64_t m) const {
    const Rows<const float> from{x[m], x.stride};
    int64_t o = 0;
    for (; o + kSide <= outs; o += kSide)
      dots<rows, kSide>(K, from, w + o * stride, stride, {y[m] + o, y.stride});
    for (; o < outs; ++o) dots<rows, 1>(K, from, w + o * stride, stride, {y[m] + o, y.stride});
  }
};

template <int vectors>
struct Columns {
  int64_t K, stride;
  Rows<const float> x;
  const float* b;
  Rows<float> y;
  int count;
  template <int rows>
  void operator()(int64_t m) const {
    columns<rows, vectors>(K, {x[m], x.stride}, b, stride, {y[m], y.stride}, count);
  }
};

// y (M, N) += x (M, K) B, with B (K, N).
static void block_product(
    int64_t M, int64_t K, int64_t N, Rows<const float> x, const float* b, Rows<float> y) {
  int64_t n = 0;
  for (; n + kSide * kLanes <= N; n += kSide * kLanes)
    by_rows(M, Columns<kSide>{K, N, x, b + n, {y.data + n, y.stride}, kLanes});
  for (; n < N; n += kLanes) {
    const int count = N - n < kLanes ? static_cast<int>(N - n) : kLanes;
    by_rows(M, Columns<1>{K, N, x, b + n, {y.data + n, y.stride}, count});
  }
}

// y (M, outputs) += x W^T.
static void product(const fd_layer& layer, int64_t M, Rows<const float> x, Rows<float> y) {
  const int64_t block = 4 * kSide;  // outputs whose weights stay near while all rows use them
  const int64_t blocks = (layer.outputs + block - 1) / block;
  parallel_ranges(blocks, grain(block * layer.inputs * M), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t o = i * block, left = layer.outputs - o;
      by_rows(M, Dots{layer.inputs, layer.stride, x, layer.weight + o * layer.stride,
                      {y.data + o, y.stride}, left < block ? left : block});
    }
  });
}

// y (M, outputs) += the columns of W of each row's latents.
static void gather(
    const fd_rssm& model, const fd_layer& layer, int64_t M, Rows<const int32_t> index,
    Rows<float> y) {
  constexpr int64_t block = 8;
  const int64_t blocks = (layer.outputs + block - 1) / block;
  parallel_ranges(blocks, grain(block * model.stoch * M), [&](int64_t begin, int64_t end) {
    for (int64_t o = begin * block; o < end * block; o += block)
      for (int64_t m = 0; m < M; ++m) {
        const int64_t count = layer.outputs - o < block ? layer.outputs - o : block;
        for (int64_t s = 0; s < model.stoch; ++s) {
          if (index[m][s] < 0) continue;
          const float* w = layer.weight + o * layer.stride + s * model.classes + index[m][s];
          for (int64_t i = 0; i < count; ++i) y[m][o + i] += w[i * layer.stride];
        }
      }
  });
}

class Step {
 public:
  Step(const fd_rssm& model, const fd_act& args)
      : model_(model), args_(args), M_(args.N), latent_(model.stoch * model.classes) {}

  void run() const {
    const int64_t D = model_.deter, S = model_.stoch, A = model_.action, X = input_width(model_);
    const int64_t wide = widest();
    const Buffer memory(M_ * (5 * D + X + 2 * wide + A + S));
    const Rows<float> h{memory.get(), D + X}, hidden{h[M_], D}, gates{hidden[M_], 3 * D};
    const Rows<float> x{gates[M_], wide}, y{x[M_], wide}, action{y[M_], A};
    const Rows<float> next{args_.next_deter, D};
    const Rows<int32_t> index{reinterpret_cast<int32_t*>(action[M_]), S};
    start(h, index, action);
    inputs({h.data, h.stride}, {index.data, S}, {action.data, A}, {h.data + D, h.stride}, x);
    if (model_.cell == FD_CELL_GRU) gru({h.data, h.stride}, gates, next);
    else block_gru({h.data, h.stride}, hidden, gates, next, x.data);
    posterior(next, index, x, y);
    for (int64_t m = 0; m < M_; ++m) write_one_hot(model_, index[m], args_.next_stoch + m * latent_);
    act({next.data, D}, {index.data, S}, x, y);
  }

 private:
  int64_t widest() const {
    int64_t most = latent_ > input_width(model_) ? latent_ : input_width(model_);
    if (2 * model_.action > most) most = 2 * model_.action;
    if (model_.deter > most) most = model_.deter;
    for (int64_t i = 0; i < args_.embedding_layers; ++i)
      if (args_.embedding[i].outputs > most) most = args_.embedding[i].outputs;
    for (int64_t i = 0; i < args_.policy_layers; ++i)
      if (args_.policy[i].outputs > most) most = args_.policy[i].outputs;
    return most;
  }

  // State, classes and action before the step: where is_first, the initial ones and none.
  void start(Rows<float> h, Rows<int32_t> index, Rows<float> action) const {
    for (int64_t m = 0; m < M_; ++m) {
      const bool first = args_.is_first[m];
      copy(first ? args_.initial_deter : args_.deter + m * model_.deter, h[m], model_.deter);
      const float* stoch = first ? args_.initial_stoch : args_.stoch + m * latent_;
      for (int64_t s = 0; s < model_.stoch; ++s, stoch += model_.classes) {
        index[m][s] = -1;
        float largest = 0;
        for (int64_t k = 0; k < model_.classes; ++k)
          if (stoch[k] > largest) largest = stoch[k], index[m][s] = static_cast<int32_t>(k);
      }
      if (first) fill(action[m], 0, model_.action);
      else limit_action(model_, args_.action + m * model_.action, action[m]);
    }
  }

  void inputs(
      Rows<const float> h, Rows<const int32_t> index, Rows<const float> action, Rows<float> x,
      Rows<float> before) const {
    const int64_t U = model_.hidden;
    const bool blocks = model_.cell == FD_CELL_BLOCK_GRU;
    const Rows<float> by_stoch{before.data + (blocks ? U : 0), before.stride};
    const Rows<float> by_action{before.data + (blocks ? 2 * U : 0), before.stride};
    start_rows(by_stoch, model_.in_stoch.bias, M_, U);
    if (blocks) {
      start_rows(before, model_.in_deter.bias, M_, U);
      start_rows(by_action, model_.in_action.bias, M_, U);
      product(model_.in_deter, M_, h, before);
      activate(model_.in_deter, before, x);
    }
    gather(model_, model_.in_stoch, M_, index, by_stoch);
    product(model_.in_action, M_, action, by_action);
    activate(model_.in_stoch, by_stoch, {x.data + (blocks ? U : 0), x.stride});
    if (blocks) activate(model_.in_action, by_action, {x.data + 2 * U, x.stride});
  }

  void activate(const fd_layer& layer, Rows<float> x, Rows<float> y) const {
    const Norm norm = norm_of(model_, layer.scale, layer.shift);
    for (int64_t m = 0; m < M_; ++m) norm_row<true>(norm, x[m], y[m], layer.outputs);
  }

  // hx (M, D + U): the state and behind it the input.
  void gru(Rows<const float> hx, Rows<float> gates, Rows<float> next) const {
    const fd_gru cell = gru_of(model_);
    const int64_t D = cell.deter, K = D + cell.inputs;
    const fd_layer joint{cell.gate_weight, nullptr, nullptr, nullptr, K, 3 * D, K};
    start_rows(gates, nullptr, M_, 3 * D);
    product(joint, M_, hx, gates);
    for (int64_t m = 0; m < M_; ++m) {
      norm_row<false>(norm_of(cell), gates[m], gates[m], 3 * D);
      apply_gates(gates[m], hx[m], next[m], D);
    }
  }

  void block_gru(
      Rows<const float> hx, Rows<float> hidden, Rows<float> gates, Rows<float> next,
      float* scratch) const {
    const fd_gru cell = gru_of(model_);
    const int64_t D = cell.deter, G = cell.blocks, width = D / G, X = cell.inputs;
    start_rows(hidden, cell.hidden_bias, M_, D);
    parallel_ranges(G, grain((width + X) * width * M_), [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        const float* weight = cell.hidden_weight + g * (width + X) * width;
        const Rows<float> part{hidden.data + g * width, hidden.stride};
        block_product(M_, width, width, {hx.data + g * width, hx.stride}, weight, part);
        block_product(M_, X, width, {hx.data + D, hx.stride}, weight + width * width, part);
      }
    });
    const Rows<float> z{scratch, D};
    for (int64_t m = 0; m < M_; ++m) norm_row<true>(norm_of(cell), hidden[m], z[m], D);
    start_rows(gates, cell.gate_bias, M_, 3 * D);
    parallel_ranges(G, grain(3 * width * width * M_), [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g)
        block_product(M_, width, 3 * width, {z.data + g * width, D},
                      cell.gate_weight + g * width * 3 * width,
                      {gates.data + 3 * g * width, gates.stride});
    });
    for (int64_t m = 0; m < M_; ++m)
      for (int64_t at = 0; at < D; at += width)
        apply_gates(gates[m] + 3 * at, hx[m] + at, next[m] + at, width);
  }

  void posterior(Rows<float> deter, Rows<int32_t> index, Rows<float> x, Rows<float> y) const {
    Rows<const float> from{args_.x, args_.embedding[0].inputs};
    for (int64_t i = 0; i < args_.embedding_layers; ++i) {
      const fd_layer& layer = args_.embedding[i];
      start_rows(x, layer.bias, M_, layer.outputs);
      product(layer, M_, from, x);
      if (i + 1 == args_.embedding_layers) break;
      activate(layer, x, x);
      from = {x.data, x.stride};
      swap(x, y);
    }
    product(model_.head[0], M_, {deter.data, deter.stride}, x);
    activate(model_.head[0], x, x);
    const Rows<float> logits{y.data, latent_};
    start_rows(logits, model_.head[1].bias, M_, latent_);
    product(model_.head[1], M_, {x.data, x.stride}, logits);
    draw_latents(
        M_, model_.stoch, model_.classes, model_.mix, {logits.data, latent_},
        {args_.noise, latent_}, {nullptr, 0}, index);
  }

  void act(Rows<const float> deter, Rows<const int32_t> index, Rows<float> x, Rows<float> y) const {
    fd_layer by_deter = args_.policy[0], by_stoch = by_deter;
    by_deter.inputs = model_.deter, by_stoch.inputs = latent_;
    by_deter.weight += args_.deter_first ? 0 : latent_;
    by_stoch.weight += args_.deter_first ? model_.deter : 0;
    start_rows(x, by_deter.bias, M_, by_deter.outputs);
    product(by_deter, M_, deter, x);
    gather(model_, by_stoch, M_, index, x);
    activate(by_deter, x, x);
    for (int64_t i = 1; i < args_.policy_layers; ++i) {
      const fd_layer& layer = args_.policy[i];
      start_rows(y, layer.bias, M_, layer.outputs);
      product(layer, M_, {x.data, x.stride}, y);
      activate(layer, y, y);
      swap(x, y);
    }
    for (int64_t part = 0, head = 0, at = 0; part < args_.parts; at += args_.part_sizes[part++]) {
      const int64_t n = args_.part_sizes[part];
      const bool discrete = args_.discrete[part];
      const Rows<float> raw{y.data, discrete ? n : 2 * n};
      output(args_.heads[head++], x, raw);
      if (!discrete) output(args_.heads[head++], x, {raw.data + n, raw.stride});
      else unimix_rows(raw.data, raw.data, 0, M_, n, args_.policy_mix);
      for (int64_t m = 0; m < M_; ++m) {
        const int64_t to = m * model_.action + at;
        if (discrete) draw_action(raw[m], args_.action_noise + to, args_.next_action + to, n);
        else normal_action(raw[m], args_.action_noise + to, args_.next_action + to, n);
      }
    }
  }

  void output(const fd_layer& head, Rows<float> x, Rows<float> to) const {
    start_rows(to, head.bias, M_, head.outputs);
    product(head, M_, {x.data, x.stride}, to);
  }

  static void swap(Rows<float>& x, Rows<float>& y) {
    const Rows<float> other = x;
    x = y, y = other;
  }

  const fd_rssm& model_;
  const fd_act& args_;
  int64_t M_, latent_;
};

}  // namespace

void policy_step(const fd_rssm& model, const fd_act& args) { Step(model, args).run(); }

}  // namespace FD_ISA
}  // namespace fastdreamer
