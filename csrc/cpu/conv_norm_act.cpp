// Convolution with pooling, norm and SiLU at the C boundary; the work is in simd/.
#include <algorithm>
#include <vector>

#include "check.h"
#include "conv.h"
#include "isa.h"
#include "parallel.h"
#include "tensor.h"

namespace fastdreamer {

FD_DECLARE(void conv_norm_act(const fd_conv&, int64_t, int64_t))
FD_DECLARE(void conv_norm_act_backward(
    const fd_conv&, const fd_conv_grad&, int64_t, int64_t, float*))

namespace {

constexpr int64_t kMaxParts = 32;
constexpr int64_t kPartBlocks = 4;           // blocks that are worth sums of their own
constexpr int64_t kMaxSums = 1 << 24;        // elements of all parts' sums
constexpr int64_t kMaxImage = 1 << 26;       // elements of the larger image, at 4 H W
constexpr int64_t kMaxImages = 1LL << 36;

void forward(const fd_conv& conv, int64_t begin, int64_t end) {
  FD_DISPATCH(conv_norm_act(conv, begin, end))
}

void backward(
    const fd_conv& conv, const fd_conv_grad& grad, int64_t begin, int64_t end, float* sums) {
  FD_DISPATCH(conv_norm_act_backward(conv, grad, begin, end, sums))
}

int64_t blocks_of(const fd_conv& conv) { return (conv.N + kConvBlock - 1) / kConvBlock; }

// Parts of the batch whose sums are apart: they depend on the shape alone, so that results do not
// depend on the threads.
int64_t parts_of(const fd_conv& conv) {
  const int64_t most = std::min(kMaxParts, kMaxSums / conv_size(conv).sums);
  const int64_t blocks = blocks_of(conv), wanted = (blocks + kPartBlocks - 1) / kPartBlocks;
  return std::max<int64_t>(1, std::min(most, wanted));
}

// Whether the product of positive sizes is at most `most`.
bool fits(int64_t most, std::initializer_list<int64_t> sizes) {
  for (const int64_t size : sizes) most /= size;
  return most > 0;
}

}  // namespace

int32_t check_conv(const fd_conv* conv) {
  if (!conv) return FD_ERROR_NULL_POINTER;
  if (conv->kind < FD_CONV_POOL || conv->kind > FD_CONV_TRANSPOSE) return FD_ERROR_SIZE;
  if (conv->N < 0 || conv->H < 1 || conv->W < 1 || conv->C < 1 || conv->O < 1) return FD_ERROR_SIZE;
  if (conv->N > kMaxImages || !fits(kMaxImage, {4, conv->H, conv->W, std::max(conv->C, conv->O)}) ||
      !fits(kMaxSums, {40, conv->C, conv->O}))
    return FD_ERROR_SIZE;
  if (shrinks(*conv) && (conv->H % 2 || conv->W % 2)) return FD_ERROR_SIZE;
  if (!is_compute(conv->output) || !(is_compute(conv->input) || conv->input == FD_UINT8))
    return FD_ERROR_DTYPE;
  if (conv->N == 0) return FD_OK;
  if (!conv->x || (conv->scale && !conv->z) || (conv->kind == FD_CONV_POOL && !conv->index))
    return FD_ERROR_NULL_POINTER;
  return FD_OK;
}

}  // namespace fastdreamer

int32_t fd_conv_norm_act(const fd_conv* conv) {
  using namespace fastdreamer;
  if (const int32_t error = check_conv(conv)) return error;
  if (conv->N == 0) return FD_OK;
  if (any_null({conv->weight, conv->y})) return FD_ERROR_NULL_POINTER;
  parallel_ranges(
      blocks_of(*conv), 1, [&](int64_t begin, int64_t end) { forward(*conv, begin, end); });
  return FD_OK;
}

int32_t fd_conv_norm_act_backward(const fd_conv* conv, const fd_conv_grad* grad) {
  using namespace fastdreamer;
  if (const int32_t error = check_conv(conv)) return error;
  if (!grad || any_null({grad->dweight, grad->dbias, grad->dscale, grad->dshift}))
    return FD_ERROR_NULL_POINTER;
  if (grad->dx && conv->input == FD_UINT8) return FD_ERROR_DTYPE;
  if (conv->N > 0 && (!grad->dy || (grad->dx && !grad->weight))) return FD_ERROR_NULL_POINTER;
  const ConvSize size = conv_size(*conv);
  const int64_t parts = parts_of(*conv), blocks = blocks_of(*conv);
  std::vector<float> sums(parts * size.sums);
  parallel_for(parts, [&](int64_t p) {
    backward(
        *conv, *grad, p * blocks / parts, (p + 1) * blocks / parts, sums.data() + p * size.sums);
  });
  for (int64_t p = 1; p < parts; ++p)
    for (int64_t i = 0; i < size.sums; ++i) sums[i] += sums[p * size.sums + i];
  const float* from = sums.data();
  std::copy(from, from + size.weights, grad->dweight);
  from += size.weights;
  for (float* to : {grad->dbias, grad->dscale, grad->dshift}) {
    std::copy(from, from + conv->O, to);
    from += conv->O;
  }
  return FD_OK;
}
