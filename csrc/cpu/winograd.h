// Sizes of a convolution by minimal filtering that its boundary and its kernels share.
#ifndef FASTDREAMER_CPU_WINOGRAD_H
#define FASTDREAMER_CPU_WINOGRAD_H

#include "conv.h"

namespace fastdreamer {

// A window of stride 2 is four filters of half its size, each over the pixels of one parity, which
// lie side by side as channels (`ins`). One that splits gives outputs of four parities: side by side
// too (`outs`), or, where it also shifts and each has an input of its own, one after the other
// (`groups`).
// Channels are filled up with zeros to whole vectors of every instruction set.
struct Winograd {
  Window window;
  int64_t N, H, W, C, O;       // images, their size and channels before, channels after
  int64_t R, m, T;             // taps, and a tile's outputs and products, along one axis
  int64_t ins, outs, groups;
  int64_t padded_C, padded_O;
  int64_t depth, width;        // of the left and of the right matrix of a product
  int64_t rows, columns;       // of tiles in an image
  int64_t tiles;               // of all images
  int64_t weights;             // elements of the right matrices of a group
};

static inline Winograd winograd_of(
    const Window& window, int64_t N, int64_t H, int64_t W, int64_t C, int64_t O) {
  Winograd w{};
  w.window = window;
  w.N = N, w.H = H, w.W = W, w.C = C, w.O = O;
  w.R = window.K / window.stride;
  w.m = w.R == 5 ? 2 : 4;
  w.T = w.m + w.R - 1;
  w.ins = window.stride == 2 ? 4 : 1;
  w.outs = window.splits && !window.shifts ? 4 : 1;
  w.groups = window.shifts ? 4 : 1;
  w.padded_C = (C + 15) / 16 * 16, w.padded_O = (O + 15) / 16 * 16;
  w.depth = w.ins * w.padded_C;
  w.width = w.outs * w.padded_O;
  w.rows = (H / window.stride + w.m - 1) / w.m;
  w.columns = (W / window.stride + w.m - 1) / w.m;
  w.tiles = N * w.rows * w.columns;
  w.weights = w.T * w.T * w.depth * w.width;
  return w;
}

}  // namespace fastdreamer

#endif
