// Sizes of a convolution that its boundary and its kernels share. The inline functions are static:
// each instruction set keeps its own.
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

// A K x K window that moves by `stride`. Where it `splits`, each parity of the output's row and
// column has weights of its own over the same input; where it `shifts` too, the odd ones start one
// row or column later.
struct Window {
  int64_t border, K, stride;
  bool splits, shifts;
};

// By kind: of the convolution, and of the one that gives its input's gradient.
constexpr Window kForward[] = {
    {2, 5, 1, false, false}, {1, 4, 2, false, false}, {1, 3, 1, true, false}, {1, 2, 1, true, true}};
constexpr Window kBackward[] = {
    {2, 5, 1, false, false}, {1, 2, 1, true, true}, {2, 6, 2, false, false}, {1, 4, 2, false, false}};

// FD_OK, or what is wrong with it.
int32_t check_conv(const fd_conv* conv);

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
