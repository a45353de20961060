// LayerNorm or RMSNorm of rows with an optional SiLU behind it; the formulas are in simd/norm.h.
#include <algorithm>
#include <vector>

#include "check.h"
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
FD_DECLARE_PRODUCTS(void norm_half_rows(
    const uint16_t* x, const float* scale, const float* shift, uint16_t* y, int64_t rows, int64_t n,
    bool centred, float eps, bool silu))
FD_DECLARE_PRODUCTS(void norm_half_rows_backward(
    const uint16_t* dy, const uint16_t* x, const float* scale, const float* shift, uint16_t* dx,
    float* dscale, float* dshift, int64_t rows, int64_t n, bool centred, float eps, bool silu))

namespace {

constexpr int64_t kGrain = 16384;  // elements that are worth a thread
constexpr int64_t kMaxParts = 64;
constexpr int64_t kBlock = 16;  // rows that stay together, the lanes of the widest vector

// What a call does to all its rows; x, y and their gradients are of one type.
struct Call {
  const float *scale, *shift;
  int64_t rows, n;
  bool centred, silu;
  float eps;
};

void rows_forward(const Call& c, const float* x, float* y, int64_t rows) {
  FD_DISPATCH(norm_rows(x, c.scale, c.shift, y, rows, c.n, c.centred, c.eps, c.silu))
}

void rows_forward(const Call& c, const uint16_t* x, uint16_t* y, int64_t rows) {
  FD_DISPATCH_PRODUCTS(
      FD_BFLOAT16, norm_half_rows(x, c.scale, c.shift, y, rows, c.n, c.centred, c.eps, c.silu))
}

void rows_backward(
    const Call& c, const float* dy, const float* x, float* dx, float* dscale, float* dshift,
    int64_t rows) {
  FD_DISPATCH(norm_rows_backward(
      dy, x, c.scale, c.shift, dx, dscale, dshift, rows, c.n, c.centred, c.eps, c.silu))
}

void rows_backward(
    const Call& c, const uint16_t* dy, const uint16_t* x, uint16_t* dx, float* dscale,
    float* dshift, int64_t rows) {
  FD_DISPATCH_PRODUCTS(
      FD_BFLOAT16,
      norm_half_rows_backward(
          dy, x, c.scale, c.shift, dx, dscale, dshift, rows, c.n, c.centred, c.eps, c.silu))
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

template <typename T>
void forward(const Call& call, const void* x, void* y) {
  const int64_t blocks = (call.rows + kBlock - 1) / kBlock, size = kBlock * call.n;
  parallel_ranges(blocks, (kGrain + size - 1) / size, [&](int64_t begin, int64_t end) {
    const int64_t at = begin * size, count = std::min(end * kBlock, call.rows) - begin * kBlock;
    rows_forward(call, static_cast<const T*>(x) + at, static_cast<T*>(y) + at, count);
  });
}

template <typename T>
void backward(
    const Call& call, const void* dy, const void* x, void* dx, float* dscale, float* dshift) {
  const int64_t n = call.n, step = rows_of_part(call.rows, n);
  const int64_t parts = (call.rows + step - 1) / step;
  std::vector<float> partial(2 * n * parts);
  parallel_for(parts, [&](int64_t p) {
    const int64_t begin = p * step, count = std::min(step, call.rows - begin), at = begin * n;
    float* sums = partial.data() + 2 * n * p;
    rows_backward(
        call, static_cast<const T*>(dy) + at, static_cast<const T*>(x) + at,
        static_cast<T*>(dx) + at, sums, dshift ? sums + n : nullptr, count);
  });
  sum_parts(partial, parts, n, 0, dscale);
  if (dshift) sum_parts(partial, parts, n, n, dshift);
}

int32_t check(int64_t rows, int64_t n, int32_t dtype) {
  if (rows < 0 || n < 0) return FD_ERROR_SIZE;
  return is_compute(dtype) ? FD_OK : FD_ERROR_DTYPE;
}

}  // namespace
}  // namespace fastdreamer

int32_t fd_norm_act(
    const void* x, const void* scale, const void* shift, void* y,
    int64_t rows, int64_t n, int32_t centred, int32_t silu, float eps, int32_t dtype, void*) {
  using namespace fastdreamer;
  if (const int32_t error = check(rows, n, dtype)) return error;
  if (rows == 0 || n == 0) return FD_OK;
  if (any_null({x, scale, y})) return FD_ERROR_NULL_POINTER;
  const auto *factor = static_cast<const float*>(scale), *term = static_cast<const float*>(shift);
  const Call call{factor, term, rows, n, centred != 0, silu != 0, eps};
  (dtype == FD_BFLOAT16 ? forward<uint16_t> : forward<float>)(call, x, y);
  return FD_OK;
}

int32_t fd_norm_act_backward(
    const void* dy, const void* x, const void* scale, const void* shift,
    void* dx, void* dscale, void* dshift,
    int64_t rows, int64_t n, int32_t centred, int32_t silu, float eps, int32_t dtype, void*) {
  using namespace fastdreamer;
  if (const int32_t error = check(rows, n, dtype)) return error;
  if (n == 0) return FD_OK;
  if (any_null({scale, dscale}) || (shift == nullptr) != (dshift == nullptr))
    return FD_ERROR_NULL_POINTER;
  if (rows > 0 && any_null({dy, x, dx})) return FD_ERROR_NULL_POINTER;
  const auto *factor = static_cast<const float*>(scale), *term = static_cast<const float*>(shift);
  const Call call{factor, term, rows, n, centred != 0, silu != 0, eps};
  (dtype == FD_BFLOAT16 ? backward<uint16_t> : backward<float>)(
      call, dy, x, dx, static_cast<float*>(dscale), static_cast<float*>(dshift));
  return FD_OK;
}
