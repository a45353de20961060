// The imagined rollout with the policy inside, for a team's rows over all steps.
#ifndef FASTDREAMER_CUDA_IMAGINE_H
#define FASTDREAMER_CUDA_IMAGINE_H

#include "cell.h"
#include "gru.h"

namespace fastdreamer {

constexpr int kMaxParts = 8;  // of an action

// A linear layer, and the norm behind it where it is not the last one.
struct DenseLayer {
  Product product;
  const float* bias;
  Norm norm;
};

// A part of the action; a continuous one has a second layer, for its standard deviation.
struct ActionPart {
  Product product[2];
  const float* bias[2];
  int begin, size;
  bool discrete;
};

struct Imagine {
  Model model;
  int64_t N, H;
  const float *start_deter, *noise, *action_noise;
  const int32_t* start_index;
  float *feat, *action;
  int32_t* index;
  int prior_layers, layers, parts;
  bool deter_first;
  float policy_mix;
  DenseLayer layer[2 * kMaxLayers];  // the prior's, then the policy's, its first without the latents
  Table policy_table;                // their share
  ActionPart part[kMaxParts];
  // Of each team, for its rows: before norms, (rows, width) each; raw is for the layers, in turn.
  float *inputs, *hidden, *gates, *raw[2], *head;
  int raw_width;
  Share* shares;
  SharedLayout layout;

  FD_EITHER template <typename Self, typename Body>
  FD_BOTH static void each_product(Self& self, const Body& body) {
    if (self.model.blocks) body(self.model.in_deter), body(self.model.gates);
    body(self.model.state), body(self.model.input);
    for (int i = 0; i < self.layers; ++i) body(self.layer[i].product);
    for (int i = 0; i < self.parts; ++i)
      for (int j = 0; j < (self.part[i].discrete ? 1 : 2); ++j) body(self.part[i].product[j]);
  }
  template <typename Body>
  void each_table(const Body& body) {
    body(model.stoch_table), body(model.action_table), body(policy_table);
  }
  template <typename Compute, int MT, typename Block>
  FD_FN void run(Block& b, const Memory<Compute, MT>& memory) const;
};

// A team's rows at one step; step t leads from state t - 1 to state t.
struct ImagineAt {
  const Imagine& args;
  const Model& model;
  int64_t row0, team_row, t;

  template <typename T>
  FD_FN T* at(T* data, int row, int64_t width, int64_t step) const {
    return data + ((row0 + row) * (args.H + 1) + step) * width;
  }
  FD_FN int64_t width() const { return model.deter + model.latent(); }
  FD_FN float* deter(int row, int64_t step) const {
    return at(args.feat, row, width(), step) + (args.deter_first ? 0 : model.latent());
  }
  FD_FN float* deter(int row) const { return deter(row, t); }
  FD_FN float* stoch(int row) const {
    return at(args.feat, row, width(), t) + (args.deter_first ? model.deter : 0);
  }
  FD_FN const float* last_deter(int row) const { return deter(row, t - 1); }
  FD_FN int32_t* index(int row) const { return at(args.index, row, model.stoch, t); }
  FD_FN const int32_t* last_index(int row) const { return at(args.index, row, model.stoch, t - 1); }
  FD_FN float action(int row, int i) const {  // as the cell takes it
    const float x = at(args.action, row, model.action, t - 1)[i], size = x < 0 ? -x : x;
    return model.blocks && size > 1 ? x / size : x;
  }
  FD_FN float* own(float* data, int row, int64_t width) const {
    return data + (team_row + row) * width;
  }
  FD_FN float* inputs(int row) const { return own(args.inputs, row, model.inputs); }
  FD_FN float* hidden(int row) const { return own(args.hidden, row, model.deter); }
  FD_FN float* gates(int row) const { return own(args.gates, row, 3 * model.deter); }
  FD_FN float* raw(int which, int row) const { return own(args.raw[which], row, args.raw_width); }
  FD_FN float* head(int row) const { return own(args.head, row, 2 * model.action); }
};

FD_FN float normal(float mean, float std, float noise) {
  return tanhf(mean) + (0.9f * sigmoid(std + 2.0f) + 0.1f) * noise;
}

template <typename Compute, int MT, typename Block>
struct StepImagine {
  Block& b;
  const Memory<Compute, MT>& memory;
  const Imagine& args;
  const Model& m;
  ImagineAt at;
  int rows;

  // Rows of a layer's inputs: states t, or behind its norm what the layer before left.
  FD_FN void stage_input(const Product& p, const DenseLayer* before, const float* raw) {
    const int padded = p.padded(), stride = padded + 8;
    if (before)
      stage_norms<Compute, MT>(b, memory, stride, 0, padded, &before->norm, 1, rows,
                               [&](int row) { return raw + row * args.raw_width; });
    else
      stage<Compute, MT>(b, memory, stride, 0, m.deter, padded, rows,
                         [&](int row, int i) { return at.deter(row)[i]; });
    b.sync();
  }

  FD_FN void start() {
    for (int row = b.member; row < rows; row += b.members) {
      const int64_t from = at.row0 + row;
      for (int i = b.thread(); i < m.deter; i += b.threads())
        at.deter(row)[i] = args.start_deter[from * m.deter + i];
      for (int s = b.thread(); s < m.stoch; s += b.threads()) {
        const int k = args.start_index[from * m.stoch + s];
        at.index(row)[s] = k;
        for (int i = 0; i < m.classes; ++i) at.stoch(row)[s * m.classes + i] = i == k;
      }
    }
    b.team_sync();
  }

  // The prior's layers, whose logits become the sample in its place, then those of the policy; each
  // phase of a layer ends with the team's barrier. From the first layer on, or the policy's.
  FD_FN void layers(int first) {
    for (int i = first; i < args.layers; ++i) {
      const DenseLayer& layer = args.layer[i];
      const bool logits = i == args.prior_layers - 1, policy = i == args.prior_layers;
      stage_input(layer.product, i > 0 && !policy ? &layer - 1 : nullptr, at.raw((i + 1) % 2, 0));
      const Operand<Compute> operands[1] = {
          {memory.rows(), layer.product.padded() + 8, 0, 0, &layer.product}};
      multiply<Compute, MT>(b, memory, operands, rows, [&](int row, int column, float sum) {
        if (layer.bias) sum += layer.bias[column];
        if (policy)
          sum += gather<Compute>(
              memory.workspace, args.policy_table, at.index(row), m.stoch, m.classes, column);
        (logits ? at.stoch(row) : at.raw(i % 2, row))[column] = sum;
      });
      if (logits) draw_latents(layer.product);
      b.team_sync();
    }
  }

  FD_FN void draw_latents(const Product& p) {
    by_own_latents(b, m, p, rows, [&](int row, int s) {
      float* logits = at.stoch(row) + s * m.classes;
      const int64_t from = (at.row0 + row) * args.H + at.t - 1;
      const float* noise = args.noise + from * m.latent() + s * m.classes;
      const int drawn = draw(logits, noise, m.classes, m.mix, logits);
      by_lane([&](int lane, int) {
        for (int k = lane; k < m.classes; k += kWarp) logits[k] = k == drawn;
        if (lane == 0) at.index(row)[s] = drawn;
      });
    });
  }

  // By one block, as all of a part's classes are in it.
  FD_FN void draw_action() {
    const int last = args.layers - 1;
    const Product& first = args.part[0].product[0];
    stage_input(first, &args.layer[last], at.raw(last % 2, 0));
    const Operand<Compute> x{memory.rows(), first.padded() + 8, 0, 0, &first};
    for (int i = 0; i < args.parts; ++i) {
      const ActionPart& part = args.part[i];
      for (int j = 0; j < (part.discrete ? 1 : 2); ++j) {
        Operand<Compute> operands[1] = {x};
        operands[0].product = &part.product[j];
        multiply<Compute, MT>(b, memory, operands, rows, [&](int row, int column, float sum) {
          at.head(row)[2 * part.begin + j * part.size + column] =
              part.bias[j] ? sum + part.bias[j][column] : sum;
        });
      }
      for (int row = b.warp(); row < rows; row += b.warps()) {
        float* raw = at.head(row) + 2 * part.begin;
        const float* noise = at.at(args.action_noise, row, m.action, at.t) + part.begin;
        float* action = at.at(args.action, row, m.action, at.t) + part.begin;
        const int drawn = part.discrete ? draw(raw, noise, part.size, args.policy_mix, raw) : -1;
        by_lane([&](int lane, int) {
          for (int k = lane; k < part.size; k += kWarp)
            action[k] = part.discrete ? k == drawn : normal(raw[k], raw[part.size + k], noise[k]);
        });
      }
    }
  }
};

template <typename Compute, int MT, typename Block>
FD_FN void Imagine::run(Block& b, const Memory<Compute, MT>& memory) const {
  const TeamRows team = team_rows<MT>(b, N);
  const int64_t team_row = int64_t{b.team} * Memory<Compute, MT>::kRows;
  StepImagine<Compute, MT, Block> step{
      b, memory, *this, model, {*this, model, team.first, team_row, 0}, team.count};
  Share* mine = shares + team_row * b.members;
  for (int64_t t = 0; t <= H; ++t) {
    step.at.t = t;
    if (t == 0)
      step.start();
    else
      cell_step<Compute, MT>(b, memory, model, team.count, step.at, mine);
    step.layers(t == 0 ? prior_layers : 0);
    if (b.member == b.members - 1) step.draw_action();
    b.team_sync();
  }
}

}  // namespace fastdreamer

#endif
