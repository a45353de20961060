// Norm and SiLU over rows; see norm.h for the formulas. Narrow rows that would leave lanes idle go
// kLanes at once.
#include "columns.h"
#include "gemm.h"
#include "half.h"
#include "norm_lanes.h"

namespace fastdreamer {
namespace FD_ISA {
namespace {

// Element j of kLanes rows of n < kNarrow elements.
struct Columns {
  Vec v[kNarrow];
  float* data() { return reinterpret_cast<float*>(v); }
};

template <bool silu, typename N>
void norm_columns(const N& norm, const float* x, float* y, int64_t n) {
  Columns columns;
  load_columns(x, n, columns.v);
  norm_lanes<silu>(norm, columns.data(), n);
  store_columns(y, n, columns.v);
}

// Adds to dscale and dshift, which have a vector for each column.
template <bool silu, typename N>
void norm_columns_backward(
    const N& norm, const float* x, const float* dy, float* dx, Columns& dscale, Columns& dshift,
    int64_t n) {
  Columns columns, grad;
  load_columns(x, n, columns.v);
  load_columns(dy, n, grad.v);
  norm_lanes_backward<silu, kLanes>(
      norm, columns.data(), grad.data(), dscale.data(), dshift.data(), n);
  store_columns(dx, n, grad.v);
}

template <bool silu, typename N>
void forward_as(const N& norm, const float* x, float* y, int64_t rows, int64_t n) {
  int64_t i = 0;
  if (by_columns(n))
    for (; i + kLanes <= rows; i += kLanes) norm_columns<silu>(norm, x + i * n, y + i * n, n);
  norm_each_row<silu>(norm, rows - i, x + i * n, n, y + i * n, n, n);
}

template <bool silu, typename N>
void backward_as(
    const N& norm, const float* x, const float* dy, float* dx, float* dscale, float* dshift,
    int64_t rows, int64_t n) {
  int64_t i = 0;
  if (by_columns(n) && rows >= kLanes) {
    Columns scales = {}, shifts = {};
    for (; i + kLanes <= rows; i += kLanes)
      norm_columns_backward<silu>(norm, x + i * n, dy + i * n, dx + i * n, scales, shifts, n);
    for (int64_t j = 0; j < n; ++j) dscale[j] += sum(scales.v[j]);
    for (int64_t j = 0; dshift && j < n; ++j) dshift[j] += sum(shifts.v[j]);
  }
  norm_each_row_backward<silu>(
      norm, rows - i, {x + i * n, n}, {dy + i * n, n}, {dx + i * n, n}, dscale, dshift, n);
}

template <typename N>
void forward(const N& norm, bool silu, const float* x, float* y, int64_t rows, int64_t n) {
  (silu ? forward_as<true, N> : forward_as<false, N>)(norm, x, y, rows, n);
}

template <typename N>
void backward(
    const N& norm, bool silu, const float* x, const float* dy, float* dx, float* dscale,
    float* dshift, int64_t rows, int64_t n) {
  (silu ? backward_as<true, N> : backward_as<false, N>)(
      norm, x, dy, dx, dscale, dshift, rows, n);
}

// Rows in bfloat16 that are widened at once: their elements should stay in the first cache.
int64_t rows_of_block(int64_t n) {
  return by_columns(n) ? 4 * kLanes : n <= 256 ? kAhead : kBeside;
}

void prefetch(const uint16_t* x, int64_t n) {
  constexpr int64_t line = 64 / sizeof *x;  // elements of a cache line
  for (int64_t i = 0; i < n; i += line) __builtin_prefetch(x + i, 0, 2);
}

}  // namespace

void norm_rows(
    const float* x, const float* scale, const float* shift, float* y, int64_t rows, int64_t n,
    bool centred, float eps, bool silu) {
  forward(Norm{scale, shift, centred, eps}, silu, x, y, rows, n);
}

// Adds to dscale and, if not null, dshift.
void norm_rows_backward(
    const float* dy, const float* x, const float* scale, const float* shift, float* dx,
    float* dscale, float* dshift, int64_t rows, int64_t n, bool centred, float eps, bool silu) {
  backward(Norm{scale, shift, centred, eps}, silu, x, dy, dx, dscale, dshift, rows, n);
}

// The same with x, y and their gradients in bfloat16, by blocks of rows in float32.
void norm_half_rows(
    const uint16_t* x, const float* scale, const float* shift, uint16_t* y, int64_t rows, int64_t n,
    bool centred, float eps, bool silu) {
  const HalfNorm norm{{scale, shift, centred, eps}};
  const int64_t step = rows_of_block(n);
  const Buffer block(step * n);
  for (int64_t i = 0; i < rows; i += step) {
    const int64_t count = rows - i < step ? rows - i : step, at = i * n;
    widen(x + at, block.get(), count * n);
    prefetch(x + at + count * n, count * n);
    forward(norm, silu, block.get(), block.get(), count, n);
    narrow(block.get(), y + at, count * n);
  }
}

void norm_half_rows_backward(
    const uint16_t* dy, const uint16_t* x, const float* scale, const float* shift, uint16_t* dx,
    float* dscale, float* dshift, int64_t rows, int64_t n, bool centred, float eps, bool silu) {
  const HalfNorm norm{{scale, shift, centred, eps}};
  const int64_t step = rows_of_block(n);
  const Buffer block(step * n), grad(step * n);
  for (int64_t i = 0; i < rows; i += step) {
    const int64_t count = rows - i < step ? rows - i : step, at = i * n;
    widen(x + at, block.get(), count * n);
    widen(dy + at, grad.get(), count * n);
    prefetch(x + at + count * n, count * n);
    prefetch(dy + at + count * n, count * n);
    prefetch(dx + at + count * n, count * n);
    backward(norm, silu, block.get(), grad.get(), grad.get(), dscale, dshift, count, n);
    narrow(grad.get(), dx + at, count * n);
  }
}

}  // namespace FD_ISA
}  // namespace fastdreamer
