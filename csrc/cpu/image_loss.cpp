// An image is a row; the formulas are in simd/image_loss.cpp.
#include "isa.h"
#include "parallel.h"
#include "tensor.h"

namespace fastdreamer {

FD_DECLARE(void image_loss_rows(
    const float*, const uint8_t*, float*, int64_t, int64_t, int64_t, float, bool))
FD_DECLARE(void image_loss_rows_backward(
    const float*, const float*, const uint8_t*, float*, int64_t, int64_t, int64_t, float, bool))

}  // namespace fastdreamer

using namespace fastdreamer;

int32_t fd_image_loss(
    const float* x, const uint8_t* target, float* loss, int64_t N, int64_t K, float shift,
    int32_t squash, int32_t dtype, void*) {
  return by_row_ranges({x, target, loss}, N, K, dtype, [&](int64_t begin, int64_t end) {
    FD_DISPATCH(image_loss_rows(x, target, loss, begin, end, K, shift, squash != 0))
  });
}

int32_t fd_image_loss_backward(
    const float* dloss, const float* x, const uint8_t* target, float* dx, int64_t N, int64_t K,
    float shift, int32_t squash, int32_t dtype, void*) {
  return by_row_ranges({dloss, x, target, dx}, N, K, dtype, [&](int64_t begin, int64_t end) {
    FD_DISPATCH(image_loss_rows_backward(dloss, x, target, dx, begin, end, K, shift, squash != 0))
  });
}
