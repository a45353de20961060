// LayerNorm or RMSNorm of rows with an optional SiLU behind it; the formulas are in simd/norm.h.
#include <algorithm>
#include <vector>

#include "isa.h"
#include "parallel.h"
#include "tensor.h"

namespace fastdreamer {

FD_DECLARE(void norm_rows(
    const float* x, const float* scale, const float* shift, float* y, int64_t rows, int64_t n,
    bool centred, float eps, bool silu))
FD_DECLARE(void norm_rows_backward(
    const float* dy, const float* x, const float* scale, const float* shift, float* dx,
    float* dscale, float* dshift, int64_t rows, int64_t n, bool centred, float eps, bool silu))

namespace {

constexpr int64_t kGrain = 16384;  // elements that are worth a thread
constexpr int64_t kMaxParts = 64;
constexpr int64_t kBlock = 16;  // rows that stay together, the lanes of the widest vector

void forward(
    const float* x, const float* scale, const float* shift, float* y, int64_t rows, int64_t n,
    bool centred, float eps, bool silu) {
  FD_DISPATCH(norm_rows(x, scale, shift, y, rows, n, centred, eps, silu))
}

void backward(
    const float* dy, const float* x, const float* scale, const float* shift, float* dx,
    float* dscale, float* dshift, int64_t rows, int64_t n, bool centred, float eps, bool silu) {
  FD_DISPATCH(norm_rows_backward(
      dy, x, scale, shift, dx, dscale, dshift, rows, n, centred, eps, silu))
}

// Rows of a part whose parameter gradients are summed apart. It depends on the shape alone, so
// that the sums do not depend on the threads.
int64_t rows_of_part(int64_t rows, int64_t n) {
  const int64_t least = std::max((kGrain + n - 1) / n, (rows + kMaxParts - 1) / kMaxParts);
  return (least + kBlock - 1) / kBlock * kBlock;
}

void sum_parts(
    const std::vector<float>& partial, int64_t parts, int64_t n, int64_t offset, float* out) {
  std::fill(out, out + n, 0.0f);
  for (int64_t p = 0; p < parts; ++p)
    for (int64_t j = 0; j < n; ++j) out[j] += partial[2 * n * p + offset + j];
}

int32_t check(int64_t rows, int64_t n, int32_t dtype) {
  if (rows < 0 || n < 0) return FD_ERROR_SIZE;
  return dtype == FD_FLOAT32 ? FD_OK : FD_ERROR_DTYPE;
}

}  // namespace
}  // namespace fastdreamer

int32_t fd_norm_act(
    const void* x_, const void* scale_, const void* shift_, void* y_,
    int64_t rows, int64_t n, int32_t centred, int32_t silu, float eps, int32_t dtype, void*) {
  using namespace fastdreamer;
  if (const int32_t error = check(rows, n, dtype)) return error;
  if (rows == 0 || n == 0) return FD_OK;
  if (any_null({x_, scale_, y_})) return FD_ERROR_NULL_POINTER;
  const auto *x = static_cast<const float*>(x_), *scale = static_cast<const float*>(scale_),
             *shift = static_cast<const float*>(shift_);
  auto* y = static_cast<float*>(y_);
  const int64_t blocks = (rows + kBlock - 1) / kBlock, size = kBlock * n;
  parallel_ranges(blocks, (kGrain + size - 1) / size, [&](int64_t begin, int64_t end) {
    const int64_t count = std::min(end * kBlock, rows) - begin * kBlock;
    forward(x + begin * size, scale, shift, y + begin * size, count, n, centred, eps, silu);
  });
  return FD_OK;
}

int32_t fd_norm_act_backward(
    const void* dy_, const void* x_, const void* scale_, const void* shift_,
    void* dx_, void* dscale_, void* dshift_,
    int64_t rows, int64_t n, int32_t centred, int32_t silu, float eps, int32_t dtype, void*) {
  using namespace fastdreamer;
  if (const int32_t error = check(rows, n, dtype)) return error;
  if (n == 0) return FD_OK;
  if (any_null({scale_, dscale_}) || (shift_ == nullptr) != (dshift_ == nullptr))
    return FD_ERROR_NULL_POINTER;
  if (rows > 0 && any_null({dy_, x_, dx_})) return FD_ERROR_NULL_POINTER;
  const auto *dy = static_cast<const float*>(dy_), *x = static_cast<const float*>(x_),
             *scale = static_cast<const float*>(scale_), *shift = static_cast<const float*>(shift_);
  auto* dx = static_cast<float*>(dx_);
  const int64_t step = rows_of_part(rows, n), parts = (rows + step - 1) / step;
  std::vector<float> partial(2 * n * parts);
  parallel_for(parts, [&](int64_t p) {
    const int64_t begin = p * step, count = std::min(step, rows - begin), at = begin * n;
    float* sums = partial.data() + 2 * n * p;
    backward(
        dy + at, x + at, scale, shift, dx + at, sums, shift ? sums + n : nullptr, count, n,
        centred, eps, silu);
  });
  sum_parts(partial, parts, n, 0, static_cast<float*>(dscale_));
  if (dshift_) sum_parts(partial, parts, n, n, static_cast<float*>(dshift_));
  return FD_OK;
}
