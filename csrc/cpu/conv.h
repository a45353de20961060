// Sizes of a convolution that its boundary and its kernels share.
#ifndef FASTDREAMER_CPU_CONV_H
#define FASTDREAMER_CPU_CONV_H

#include "fastdreamer.h"

namespace fastdreamer {

constexpr int64_t kConvBlock = FD_CONV_BLOCK;

struct ConvSize {
  explicit ConvSize(const fd_conv& conv) {
    const bool shrinks = conv.kind == FD_CONV_POOL || conv.kind == FD_CONV_STRIDE;
    H = shrinks ? conv.H / 2 : 2 * conv.H;
    W = shrinks ? conv.W / 2 : 2 * conv.W;
    output = H * W * conv.O;
    words = H * W * ((conv.O + 15) / 16);
    const int64_t K = conv.kind == FD_CONV_POOL ? 5 : conv.kind == FD_CONV_UPSAMPLE ? 6 : 4;
    weights = K * K * conv.C * conv.O;
    sums = weights + 3 * conv.O;
  }
  int64_t H, W;     // of the output
  int64_t output;   // elements of an output image
  int64_t words;    // of an image's index
  int64_t weights;  // elements of the weight's gradient
  int64_t sums;     // elements of all parameters' gradients
};

}  // namespace fastdreamer

#endif
