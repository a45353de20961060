// Sizes of a convolution that its boundary and its kernels share. The functions are static: each
// instruction set keeps its own.
#ifndef FASTDREAMER_CPU_CONV_H
#define FASTDREAMER_CPU_CONV_H

#include "fastdreamer.h"

namespace fastdreamer {

constexpr int64_t kConvBlock = FD_CONV_BLOCK;

struct ConvSize {
  int64_t H, W;     // of the output
  int64_t output;   // elements of an output image
  int64_t words;    // of an image's index
  int64_t weights;  // elements of the weight's gradient
  int64_t sums;     // elements of all parameters' gradients
};

static inline bool shrinks(const fd_conv& conv) {
  return conv.kind == FD_CONV_POOL || conv.kind == FD_CONV_STRIDE;
}

static inline ConvSize conv_size(const fd_conv& conv) {
  const int64_t H = shrinks(conv) ? conv.H / 2 : 2 * conv.H;
  const int64_t W = shrinks(conv) ? conv.W / 2 : 2 * conv.W;
  const int64_t K = conv.kind == FD_CONV_POOL ? 5 : conv.kind == FD_CONV_UPSAMPLE ? 6 : 4;
  const int64_t weights = K * K * conv.C * conv.O;
  return {H, W, H * W * conv.O, H * W * ((conv.O + 15) / 16), weights, weights + 3 * conv.O};
}

}  // namespace fastdreamer

#endif
