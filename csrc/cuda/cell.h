// A recurrent state-space model as the kernels take it, and one step of its cell for a team's rows.
#ifndef FASTDREAMER_CUDA_CELL_H
#define FASTDREAMER_CUDA_CELL_H

#include "latents.h"

namespace fastdreamer {

// The rows of a transposed weight, one for each input: a product with a one-hot vector is one of them.
struct Table {
  const float* weight;
  int64_t packed;  // bytes from the start of the workspace
  int stride, inputs, outputs;
};

struct Model {
  bool blocks;
  int deter, stoch, classes, action, hidden, inputs;  // inputs: units of the input layers, U or 3 U
  float mix;
  const float *in_bias[3], *hidden_bias, *gate_bias;  // blocks only; of deter, stoch, action
  Norm in_norms[3];  // blocks: deter, stoch, action; else one
  Norm cell_norm;
  Table stoch_table, action_table;
  Product in_deter, state, input, gates;  // state, input: to the hidden layer with blocks, else the gates
  Product units;  // the columns of the state, shared out like those of the gates; no weights
  int most_groups;  // that one block's columns of the state touch

  FD_BOTH int latent() const { return stoch * classes; }
};

// Latents 0 .. S - 1 whose logits are the block's columns of p: body(row, latent), by warps.
template <typename Block, typename Body>
FD_FN void by_own_latents(
    const Block& b, const Model& m, const Product& p, int rows, const Body& body) {
  const Slice slice = slice_of(b, p);
  const int each = p.width / m.classes, first = slice.first / p.unit * each;
  int last = slice.last / p.unit * each;
  if (last > m.stoch) last = m.stoch;
  const int count = last - first;
  for (int i = b.warp(); i < rows * count; i += b.warps()) body(i / count, first + i % count);
}

// The share of a one-hot latent in a linear layer's output u.
template <typename Compute>
FD_FN float gather(
    const char* workspace, const Table& table, const int32_t* index, int stoch, int classes, int u) {
  const auto* rows = reinterpret_cast<const typename Compute::Scalar*>(workspace + table.packed);
  float total = 0;
#pragma unroll 8
  for (int s = 0; s < stoch; ++s) {
    const int k = index[s];
    if (k >= 0 && k < classes) total += Compute::to(rows[int64_t{s * classes + k} * table.outputs + u]);
  }
  return total;
}

// The inputs of p's groups, each padded, of which only those groups that the block's columns touch:
// value(row, i) over all groups' inputs. Returns the first group.
template <typename Compute, int MT, typename Block, typename Value>
FD_FN int stage_groups(
    const Block& b, const Memory<Compute, MT>& memory, int stride, const Product& p, int rows,
    const Value& value) {
  const Slice slice = slice_of(b, p);
  const int first = slice.first / p.group_tiles();
  const int last = slice.tiles() > 0 ? (slice.last - 1) / p.group_tiles() : first - 1;
  for (int g = first; g <= last; ++g)
    stage<Compute, MT>(
        b, memory, stride, (g - first) * p.padded(), p.inputs, p.padded(), rows,
        [&](int row, int i) { return value(row, g * p.inputs + i); });
  return first;
}

// Before their sigmoids; that of the update gate is taken one below.
struct Gates {
  float reset, cand, update;
};
FD_FN float next_state(Gates g, float old) {
  const float u = sigmoid(g.update - 1.0f);
  return u * tanhf(sigmoid(g.reset) * g.cand) + (1.0f - u) * old;
}

// Where the gates of unit `column` of the state lie, and how far apart.
struct GateColumns {
  int first, apart;
};
FD_FN GateColumns gate_columns(const Product& gates, int column) {
  return {column / gates.width * 3 * gates.width + column % gates.width, gates.width};
}

// The cell's step; `At` has the row's tensors:
//   last_deter(row), last_index(row), action(row, i), inputs(row), hidden(row), gates(row), deter(row).
// Three phases, each ended by the team's barrier. shares: (members, kRows) in global memory.
template <typename Compute, int MT, typename Block, typename At>
FD_FN void cell_step(
    Block& b, const Memory<Compute, MT>& memory, const Model& m, int rows, const At& at,
    Share* shares) {
  constexpr int kRows = Memory<Compute, MT>::kRows;
  const int U = m.hidden;
  Moments* moments = reinterpret_cast<Moments*>(memory.moments());
  if (m.blocks) {
    const int padded = m.in_deter.padded(), stride = padded + 8;
    stage<Compute, MT>(b, memory, stride, 0, m.deter, padded, rows,
                       [&](int row, int i) { return at.last_deter(row)[i]; });
    b.sync();
    const Operand<Compute> operands[1] = {{memory.rows(), stride, 0, 0, &m.in_deter}};
    multiply<Compute, MT>(b, memory, operands, rows, [&](int row, int column, float sum) {
      at.inputs(row)[column] = sum + m.in_bias[0][column];
    });
  }
  const int gathered = m.inputs - (m.blocks ? U : 0);
  const auto* action_rows =
      reinterpret_cast<const typename Compute::Scalar*>(memory.workspace + m.action_table.packed);
  for (int i = b.member * b.threads() + b.thread(); i < rows * gathered;
       i += b.members * b.threads()) {
    const int row = i / gathered, column = i % gathered, u = column % U;
    const bool stoch = column < U, action = !m.blocks || !stoch;
    float total = m.blocks ? m.in_bias[stoch ? 1 : 2][u] : 0.0f;
    if (stoch)
      total += gather<Compute>(
          memory.workspace, m.stoch_table, at.last_index(row), m.stoch, m.classes, u);
    if (action)
      for (int k = 0; k < m.action; ++k)
        total += Compute::to(Compute::from(at.action(row, k))) *
                 Compute::to(action_rows[k * m.action_table.outputs + u]);
    at.inputs(row)[m.inputs - gathered + column] = total;
  }
  b.team_sync();

  // With blocks to the hidden layer, else to the gates.
  const int x_at = m.most_groups * m.state.padded(), stride = x_at + m.input.padded() + 8;
  const int group = stage_groups<Compute, MT>(
      b, memory, stride, m.state, rows,
      [&](int row, int i) { return at.last_deter(row)[i]; });
  stage_norms<Compute, MT>(b, memory, stride, x_at, m.input.padded(), m.in_norms, m.blocks ? 3 : 1,
                           rows, [&](int row) { return at.inputs(row); });
  b.sync();
  const Operand<Compute> operands[2] = {
      {memory.rows(), stride, m.state.padded(), group, &m.state},
      {memory.rows() + x_at, stride, 0, 0, &m.input}};
  const auto before = [&](int row) { return m.blocks ? at.hidden(row) : at.gates(row); };
  multiply<Compute, MT>(b, memory, operands, rows, [&](int row, int column, float sum) {
    before(row)[column] = m.blocks ? sum + m.hidden_bias[column] : sum;
  });
  share_moments(b, m.state, m.cell_norm.centred, rows, before, shares + b.member * kRows);
  b.team_sync();

  join_moments(b, m.cell_norm, rows, shares, kRows, moments);
  if (m.blocks) {
    const int z_stride = m.most_groups * m.gates.padded() + 8;
    const int first = stage_groups<Compute, MT>(
        b, memory, z_stride, m.gates, rows, [&](int row, int i) {
          return silu(normalise(m.cell_norm, moments[row], at.hidden(row)[i], i));
        });
    b.sync();
    const Operand<Compute> z[1] = {{memory.rows(), z_stride, m.gates.padded(), first, &m.gates}};
    multiply<Compute, MT>(b, memory, z, rows, [&](int row, int column, float sum) {
      at.gates(row)[column] = sum + m.gate_bias[column];
    });
  }
  by_own(b, m.units, rows, [&](int row, int column) {
    const GateColumns c = gate_columns(m.blocks ? m.gates : m.state, column);
    const float* raw = at.gates(row);
    const auto gate = [&](int part) {
      const int i = c.first + part * c.apart;
      return m.blocks ? raw[i] : normalise(m.cell_norm, moments[row], raw[i], i);
    };
    at.deter(row)[column] = next_state({gate(0), gate(1), gate(2)}, at.last_deter(row)[column]);
  });
  b.team_sync();
}

}  // namespace fastdreamer

#endif
