// Decided on the host before a kernel starts: its products and where they lie, its team, its memory.
#ifndef FASTDREAMER_CUDA_PLAN_H
#define FASTDREAMER_CUDA_PLAN_H

#include "cell.h"
#include "check.h"

namespace fastdreamer {

// What the choice of a team depends on.
struct Device {
  int multiprocessors;
  int shared;     // bytes that one block may use
  bool clusters;  // of thread blocks
  int cache;      // bytes of its L2 cache
};

// What the packing kernel writes into the workspace.
constexpr int kMaxProducts = 40, kMaxTables = 3;
struct Packing {
  int products, tables;
  Product product[kMaxProducts];
  Table table[kMaxTables];
  unsigned* arrived;  // (teams,) set to 0
  int teams;
};

class Workspace {
 public:
  int64_t take(int64_t bytes) {
    const int64_t at = bytes_;
    bytes_ += (bytes + 255) / 256 * 256;
    return at;
  }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
};

inline int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// A product with W^T of a weight (outputs, inputs), `stride` from row to row, to any columns.
inline Product product_of(const float* weight, int64_t inputs, int64_t outputs, int64_t stride) {
  const int n = static_cast<int>(outputs), k = static_cast<int>(inputs);
  return {weight, 0, 0, 0, 1, static_cast<int>(stride), k, k, 1, 1, n, n, 1, -1};
}
inline Product product_of(const fd_layer& layer) {
  return product_of(layer.weight, layer.inputs, layer.outputs, layer.stride);
}
// The product with W of the same layer, for gradients.
inline Product gradient_of(const fd_layer& layer) {
  Product p = product_of(layer.weight, layer.outputs, layer.inputs, 1);
  p.in_stride = static_cast<int>(layer.stride);
  return p;
}
// Its columns in `groups` equal groups, each from all inputs.
inline Product grouped(Product p, int64_t groups) {
  p.groups = static_cast<int>(groups);
  p.width = p.outputs / p.groups;
  p.group_stride = p.width * p.out_stride;
  return p;
}
// Its columns as latents of K classes: all classes of a latent in one unit.
inline Product by_latents(Product p, int64_t classes) {
  const int K = static_cast<int>(classes), each = K < kTileColumns ? kTileColumns / K : 1;
  p.width = each * K;
  p.groups = ceil_div(p.outputs, p.width);
  p.group_stride = p.width * p.out_stride;
  p.unit = p.group_tiles();
  return p;
}

inline Norm norm_of(const fd_rssm& m, const float* scale, const float* shift, int64_t width) {
  return {scale, shift, static_cast<int>(width), m.cell == FD_CELL_GRU, m.eps};
}
inline Norm norm_of(const fd_rssm& m, const fd_layer& layer) {
  return norm_of(m, layer.scale, layer.shift, layer.outputs);
}

// The columns of the state, without weights.
inline Product state_units(const fd_rssm& m) {
  return grouped(product_of(nullptr, 0, m.deter, 0), m.blocks);
}

// Sizes and norms; the weights of a step forward by forward_model.
inline Model model_of(const fd_rssm& m) {
  Model model{};
  model.blocks = m.cell == FD_CELL_BLOCK_GRU;
  model.deter = static_cast<int>(m.deter), model.stoch = static_cast<int>(m.stoch);
  model.classes = static_cast<int>(m.classes), model.action = static_cast<int>(m.action);
  model.hidden = static_cast<int>(m.hidden), model.inputs = static_cast<int>(input_width(m));
  model.mix = m.mix;
  model.hidden_bias = m.hidden_bias, model.gate_bias = m.gate_bias;
  const fd_layer* layers[3] = {&m.in_deter, &m.in_stoch, &m.in_action};
  for (int i = 0; i < 3; ++i) model.in_bias[i] = layers[i]->bias;
  if (model.blocks)
    for (int i = 0; i < 3; ++i) model.in_norms[i] = norm_of(m, *layers[i]);
  else
    model.in_norms[0] = norm_of(m, m.in_stoch);
  model.cell_norm = norm_of(m, m.cell_scale, m.cell_shift, model.blocks ? m.deter : 3 * m.deter);
  model.units = state_units(m);
  return model;
}

inline Table table_of(const fd_layer& layer, const float* weight, int64_t inputs) {
  return {weight, 0, static_cast<int>(layer.stride), static_cast<int>(inputs),
          static_cast<int>(layer.outputs)};
}

// The three gates of each of the block's units side by side.
inline Product gates_of(Product p) {
  p.parts = p.unit = 3;
  p.width /= 3;
  return p;
}

inline Model forward_model(const fd_rssm& m) {
  Model model = model_of(m);
  const int64_t D = m.deter, U = m.hidden, G = m.blocks, width = D / G;
  model.stoch_table = table_of(m.in_stoch, m.in_stoch.weight, m.in_stoch.inputs);
  model.action_table = table_of(m.in_action, m.in_action.weight, m.in_action.inputs);
  if (!model.blocks) {
    model.state = gates_of(product_of(m.gate_weight, D, 3 * D, D + U));
    model.input = gates_of(product_of(m.gate_weight + D, U, 3 * D, D + U));
    return model;
  }
  model.in_deter = product_of(m.in_deter);
  // (inputs, outputs) within a group.
  const auto of_groups = [&](const float* weight, int64_t inputs, int64_t outputs, int64_t all_inputs) {
    Product p = product_of(weight, inputs, outputs * G, 1);
    p.in_stride = static_cast<int>(outputs);
    p = grouped(p, G);
    p.group_stride = static_cast<int>(all_inputs * outputs);
    return p;
  };
  model.state = of_groups(m.hidden_weight, width, width, width + 3 * U);
  model.input = of_groups(m.hidden_weight + width * width, 3 * U, width, width + 3 * U);
  model.gates = gates_of(of_groups(m.gate_weight, width, 3 * width, width));
  return model;
}

// Groups that one block's columns touch at most.
inline int most_groups(const Product& p, int members) {
  int most = 1;
  for (int i = 0; i < members; ++i) {
    const Slice slice = slice_of(p, i, members);
    const int first = slice.first / p.group_tiles(), last = (slice.last - 1) / p.group_tiles();
    if (slice.tiles() > 0 && last - first + 1 > most) most = last - first + 1;
  }
  return most;
}

// Elements of a row that a step forward stages at most.
inline int staged_width(const Model& m) {
  int most = m.most_groups * m.state.padded() + m.input.padded();
  if (m.blocks) {
    const int z = m.most_groups * m.gates.padded();
    if (z > most) most = z;
    if (m.in_deter.padded() > most) most = m.in_deter.padded();
  }
  return most;
}

inline bool fits_indices(const fd_rssm& m) {
  // Offsets within one weight are 32 bits wide, and the kernels count rows x columns in them.
  const int64_t limit = int64_t{1} << 24;
  return m.deter < limit / 64 && m.hidden < limit / 64 && m.stoch * m.classes < limit / 16 &&
         m.action < limit / 64 && m.in_stoch.stride < limit && m.in_action.stride < limit;
}

// Where the shared memory of a block goes. Weights stay in it, in the order of each_product, as long
// as they fit; false where even the rows do not. kept: whether all weights did.
template <typename Compute, int MT, typename Args>
bool lay_out(Args& args, int width, int members, int shared, bool* kept) {
  constexpr int scalar = sizeof(typename Compute::Scalar), rows = MT * kTileRows;
  constexpr int column_tiles = Memory<Compute, MT>::kColumnTiles;
  SharedLayout& layout = args.layout;
  layout.rows = rows * (width + 8) * scalar;
  layout.sums = kThreads / kWarp * column_tiles * rows * kTileColumns * 4;
  layout.moments = rows * 8 * 4;
  layout.weights = 0;
  const int left = shared - layout.rows - layout.sums - layout.moments;
  if (left < 0) return false;
  *kept = true;
  Args::each_product(args, [&](Product& p) {
    int64_t most = 0;
    for (int i = 0; i < members; ++i) {
      const int64_t bytes = slice_of(p, i, members).tiles() * p.tile_weights() * scalar;
      if (bytes > most) most = bytes;
    }
    const bool fits = layout.weights + most <= left;
    p.resident = fits ? layout.weights : -1;
    if (fits) layout.weights += static_cast<int>(most);
    *kept &= fits;
  });
  return true;
}

// Which blocks go through the steps together. A cluster of 8 where its shared memory keeps all
// weights (size 1m), as its barrier costs least, or where there are so many teams that no more
// blocks are left for each. Else the blocks of the whole device, each with a share of the weights
// that mostly stays on chip; without clusters this barrier, through memory, serves all. A device
// that has fewer blocks than teams lets each of them go alone, one after the other.
// try_layout(members) sets the arguments' layout; false where a block's memory does not hold it.
template <typename TryLayout>
bool choose_team(const Device& device, int teams, int most_members, const TryLayout& try_layout, Team* team) {
  bool kept = false;
  int members = device.multiprocessors / teams;
  if (members > most_members) members = most_members;
  int cluster = 1;
  while (cluster < 8 && 2 * cluster <= members) cluster *= 2;
  *team = {kTeamOfOne, teams, 1, nullptr};
  if (device.clusters && cluster > 1 && try_layout(cluster, &kept) && (kept || members < 16)) {
    team->kind = kTeamCluster, team->members = cluster;
    return true;
  }
  if (members > 1) team->kind = kTeamGrid, team->members = members;
  return try_layout(team->members, &kept);
}

}  // namespace fastdreamer

#endif
