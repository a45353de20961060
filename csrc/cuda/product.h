// Products of a team's rows with packed weights: which columns each block computes, and how.
#ifndef FASTDREAMER_CUDA_PRODUCT_H
#define FASTDREAMER_CUDA_PRODUCT_H

#include "compute.h"

namespace fastdreamer {

// What a block's threads share, in the order in which it lies: weights, rows of A, sums, moments.
struct SharedLayout {
  int weights, rows, sums, moments;  // bytes of each
  FD_BOTH int bytes() const { return weights + rows + sums + moments; }
};

// The packed weights of `groups` products side by side, each from its own inputs, or all from the
// same ones, to parts * width outputs. Tiles of 8 columns take the parts in turn: the tiles of one
// unit hold all parts (reset, candidate, update) of the same 8 outputs, or all classes of latents.
struct Product {
  const float* weight;
  int64_t packed;  // bytes from the start of the workspace
  int group_stride, in_group_stride, in_stride, out_stride;  // of weight, in elements
  int inputs, in_width;  // inputs of a group; of them, in_width behind one another
  int groups, parts, width, outputs;  // outputs: columns of all groups; the last may be partial
  int unit;
  int resident;  // where in shared memory the block's tiles are kept; -1: nowhere

  FD_BOTH int chunks() const { return (inputs + kChunk - 1) / kChunk; }
  FD_BOTH int group_tiles() const { return parts * ((width + kTileColumns - 1) / kTileColumns); }
  FD_BOTH int units() const { return groups * group_tiles() / unit; }
  FD_BOTH int64_t tile_weights() const { return int64_t{chunks()} * kChunkWeights; }
  FD_BOTH int64_t weights() const { return groups * group_tiles() * tile_weights(); }
  FD_BOTH int padded() const { return chunks() * kChunk; }

  // Within its group, the output of a tile's column; -1: none.
  FD_BOTH int output(int tile, int column) const {
    const int in_group = tile % group_tiles();
    const int i = in_group / parts * kTileColumns + column;
    return i < width ? in_group % parts * width + i : -1;
  }
  // The column of the result; -1: none.
  FD_BOTH int column(int tile, int j) const {
    const int out = output(tile, j), at = tile / group_tiles() * parts * width + out;
    return out < 0 || at >= outputs ? -1 : at;
  }
  FD_FN float source(int64_t at) const {
    const int tile = static_cast<int>(at / tile_weights()), rest = static_cast<int>(at % tile_weights());
    const Place place = packed_weight(rest % kChunkWeights);
    const int k = rest / kChunkWeights * kChunk + place.input;
    if (k >= inputs || column(tile, place.column) < 0) return 0;
    return weight[int64_t{tile / group_tiles()} * group_stride + int64_t{k / in_width} * in_group_stride +
                  int64_t{k % in_width} * in_stride + int64_t{output(tile, place.column)} * out_stride];
  }
};

// The tiles of one block.
struct Slice {
  int first, last;
  FD_BOTH int tiles() const { return last - first; }
};
FD_BOTH Slice slice_of(const Product& p, int member, int members) {
  const int64_t units = p.units();
  return {static_cast<int>(units * member / members) * p.unit,
          static_cast<int>(units * (member + 1) / members) * p.unit};
}

template <typename Block>
FD_FN Slice slice_of(const Block& b, const Product& p) {
  return slice_of(p, b.member, b.members);
}

// Calls body(row, column) for the block's columns of `rows` rows.
template <typename Block, typename Body>
FD_FN void by_own(const Block& b, const Product& p, int rows, const Body& body) {
  const Slice slice = slice_of(b, p);
  const int width = slice.tiles() * kTileColumns;
  for (int i = b.thread(); i < rows * width; i += b.threads()) {
    const int at = i % width, column = p.column(slice.first + at / kTileColumns, at % kTileColumns);
    if (column >= 0) body(i / width, column);
  }
}

// Rows of the team, and the first of them.
struct TeamRows {
  int64_t first;
  int count;
};
template <int MT, typename Block>
FD_FN TeamRows team_rows(const Block& b, int64_t all) {
  const int64_t first = int64_t{b.team} * MT * kTileRows, left = all - first;
  return {first, left < MT * kTileRows ? static_cast<int>(left) : MT * kTileRows};
}

// One factor of a product: rows in shared memory, `stride` apart, and weights.
template <typename Compute>
struct Operand {
  const typename Compute::Scalar* rows;
  int stride, group_stride;  // group_stride: between the groups' inputs in a row, or 0
  int first_group;           // the group whose inputs come first
  const Product* product;
};

// Weights and scratch of a kernel in Compute's type for teams of 16 MT rows.
template <typename Compute, int MT>
struct Memory {
  using Scalar = typename Compute::Scalar;
  static constexpr int kRows = MT * kTileRows;
  static constexpr int kColumnTiles = MT == 1 ? 1 : 2;  // of a warp at once

  char* workspace;
  char* shared;
  SharedLayout layout;

  FD_FN Scalar* rows() const { return reinterpret_cast<Scalar*>(shared + layout.weights); }
  FD_FN float* sums() const {
    return reinterpret_cast<float*>(shared + layout.weights + layout.rows);
  }
  FD_FN float* moments() const { return sums() + layout.sums / 4; }

  // The block's first tile.
  FD_FN const Scalar* weights(const Product& p, const Slice& slice) const {
    if (p.resident >= 0) return reinterpret_cast<const Scalar*>(shared + p.resident);
    return reinterpret_cast<const Scalar*>(workspace + p.packed) + slice.first * p.tile_weights();
  }

  template <typename Block>
  FD_FN void keep(const Block& b, const Product& p) const {
    if (p.resident < 0) return;
    const Slice slice = slice_of(b, p);
    const auto* from = reinterpret_cast<const Bfloat16::Four*>(
        reinterpret_cast<const Scalar*>(workspace + p.packed) + slice.first * p.tile_weights());
    auto* to = reinterpret_cast<Bfloat16::Four*>(shared + p.resident);
    const int count = static_cast<int>(slice.tiles() * p.tile_weights() * sizeof(Scalar) / 16);
    for (int i = b.thread(); i < count; i += b.threads()) to[i] = from[i];
  }
};

// Sums of products, for the block's columns: store(row, column, sum) for each of `rows` rows. All
// operands have the same columns. The caller has synchronised the block behind what it staged;
// afterwards what was stored is seen by the block's threads, and the rows may be staged anew.
template <typename Compute, int MT, int kOperands, typename Block, typename Store>
FD_FN void multiply(
    const Block& b, const Memory<Compute, MT>& memory, const Operand<Compute> (&operands)[kOperands],
    int rows, const Store& store) {
  constexpr int NT = Memory<Compute, MT>::kColumnTiles, kRows = MT * kTileRows;
  const Product& p = *operands[0].product;
  const Slice slice = slice_of(b, p);
  const int items = (slice.tiles() + NT - 1) / NT;
  int chunks = 0;
  for (int i = 0; i < kOperands; ++i) chunks += operands[i].product->chunks();
  int split = items > 0 && items < b.warps() ? b.warps() / items : 1;
  if (split > chunks) split = chunks;
  const int at_once = b.warps() / split;
  float* sums = memory.sums();
  for (int base = 0; base < items; base += at_once) {
    const int item = base + b.warp() % at_once, part = b.warp() / at_once;
    if (part < split && item < items) {
      Lanes<Accumulator> acc[MT][NT] = {};
      const int begin = part * chunks / split, end = (part + 1) * chunks / split;
      int before = 0;
#pragma unroll
      for (int i = 0; i < kOperands; ++i) {
        const Operand<Compute>& from = operands[i];
        const Product& product = *from.product;
        const typename Compute::Scalar *w[NT], *a[NT];
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          const int at = item * NT + n < slice.tiles() ? item * NT + n : slice.tiles() - 1;
          w[n] = memory.weights(product, slice) + at * product.tile_weights();
          a[n] = from.rows + ((slice.first + at) / p.group_tiles() - from.first_group) * from.group_stride;
        }
        const int first = begin > before ? begin - before : 0;
        const int last = end - before < product.chunks() ? end - before : product.chunks();
        before += product.chunks();
#pragma unroll 4  // so that weights are on their way while others are multiplied
        for (int c = first; c < last; ++c) {
          const typename Compute::Scalar *from_a[NT], *from_w[NT];
#pragma unroll
          for (int n = 0; n < NT; ++n)
            from_a[n] = a[n] + c * kChunk, from_w[n] = w[n] + c * kChunkWeights;
          Compute::template multiply<MT, NT>(acc, from_a, from.stride, from_w);
        }
      }
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int m = 0; m < MT; ++m)
          by_lane([&](int lane, int slot) {
            float* to = sums + ((b.warp() * NT + n) * kRows + m * kTileRows + lane / 4) * kTileColumns +
                        lane % 4 * 2;
            const float* c = acc[m][n].value[slot].c;
            to[0] = c[0], to[1] = c[1];
            to[8 * kTileColumns] = c[2], to[8 * kTileColumns + 1] = c[3];
          });
    }
    b.sync();
    const int left = slice.tiles() - base * NT;
    const int width = (left < at_once * NT ? left : at_once * NT) * kTileColumns;
    for (int i = b.thread(); i < rows * width; i += b.threads()) {
      const int row = i / width, tile = i % width / kTileColumns, j = i % kTileColumns;
      const int column = p.column(slice.first + base * NT + tile, j);
      if (column < 0) continue;
      float total = 0;
      for (int part = 0; part < split; ++part)
        total += sums[((part * at_once * NT + tile) * kRows + row) * kTileColumns + j];
      store(row, column, total);
    }
    b.sync();
  }
}

}  // namespace fastdreamer

#endif
