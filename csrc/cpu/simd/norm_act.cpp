// Norm and SiLU over rows; see norm.h for the formulas. Wide rows go one by one, narrow ones
// kLanes at once.
#include "columns.h"
#include "norm.h"

namespace fastdreamer {
namespace FD_ISA {
namespace {

struct ColumnMoments {
  Vec mean, r;
};

ColumnMoments column_moments(const Norm& norm, const Vec* x, int64_t n) {
  Vec total{}, square{}, r;
  if (norm.centred)
    for (int64_t j = 0; j < n; ++j) total += x[j];
  const Vec mean = total / static_cast<float>(n);
  for (int64_t j = 0; j < n; ++j) square += (x[j] - mean) * (x[j] - mean);
  const Vec var = square / static_cast<float>(n) + norm.eps;
  for (int i = 0; i < kLanes; ++i) r[i] = 1.0f / sqrtf(var[i]);
  return {mean, r};
}

template <bool silu>
void norm_columns(const Norm& norm, const float* x, float* y, int64_t n) {
  Vec columns[kNarrow];
  load_columns(x, n, columns);
  const ColumnMoments m = column_moments(norm, columns, n);
  for (int64_t j = 0; j < n; ++j) {
    Vec v = (columns[j] - m.mean) * m.r * norm.scale[j];
    if (norm.shift) v += norm.shift[j];
    columns[j] = silu ? v * sigmoid(v) : v;
  }
  store_columns(y, n, columns);
}

// Adds to dscale and dshift, which have a vector for each column.
template <bool silu>
void norm_columns_backward(
    const Norm& norm, const float* x, const float* dy, float* dx, Vec* dscale, Vec* dshift,
    int64_t n) {
  Vec xhat[kNarrow], grad[kNarrow], total{}, product{};
  load_columns(x, n, xhat);
  load_columns(dy, n, grad);
  const ColumnMoments m = column_moments(norm, xhat, n);
  for (int64_t j = 0; j < n; ++j) {
    xhat[j] = (xhat[j] - m.mean) * m.r;
    if (silu) {
      const Vec v = xhat[j] * norm.scale[j] + (norm.shift ? norm.shift[j] : 0.0f);
      const Vec s = sigmoid(v);
      grad[j] *= s * (1.0f + v * (1.0f - s));
    }
    dscale[j] += grad[j] * xhat[j];
    dshift[j] += grad[j];
    grad[j] *= norm.scale[j];
    total += grad[j];
    product += grad[j] * xhat[j];
  }
  const Vec mean = norm.centred ? total / static_cast<float>(n) : Vec{};
  const Vec along = product / static_cast<float>(n);
  for (int64_t j = 0; j < n; ++j) grad[j] = (grad[j] - mean - xhat[j] * along) * m.r;
  store_columns(dx, n, grad);
}

template <bool silu>
void forward(const Norm& norm, const float* x, float* y, int64_t rows, int64_t n) {
  int64_t i = 0;
  if (by_columns(n))
    for (; i + kLanes <= rows; i += kLanes) norm_columns<silu>(norm, x + i * n, y + i * n, n);
  for (; i < rows; ++i) norm_row<silu>(norm, x + i * n, y + i * n, n);
}

template <bool silu>
void backward(
    const Norm& norm, const float* x, const float* dy, float* dx, float* dscale, float* dshift,
    int64_t rows, int64_t n) {
  int64_t i = 0;
  if (by_columns(n) && rows >= kLanes) {
    Vec scales[kNarrow] = {}, shifts[kNarrow] = {};
    for (; i + kLanes <= rows; i += kLanes)
      norm_columns_backward<silu>(norm, x + i * n, dy + i * n, dx + i * n, scales, shifts, n);
    for (int64_t j = 0; j < n; ++j) dscale[j] += sum(scales[j]);
    for (int64_t j = 0; dshift && j < n; ++j) dshift[j] += sum(shifts[j]);
  }
  for (; i < rows; ++i)
    norm_row_backward<silu>(norm, x + i * n, dy + i * n, dx + i * n, dscale, dshift, n);
}

}  // namespace

void norm_rows(
    const float* x, const float* scale, const float* shift, float* y, int64_t rows, int64_t n,
    bool centred, float eps, bool silu) {
  const Norm norm{scale, shift, centred, eps};
  (silu ? forward<true> : forward<false>)(norm, x, y, rows, n);
}

// Adds to dscale and, if not null, dshift.
void norm_rows_backward(
    const float* dy, const float* x, const float* scale, const float* shift, float* dx,
    float* dscale, float* dshift, int64_t rows, int64_t n, bool centred, float eps, bool silu) {
  const Norm norm{scale, shift, centred, eps};
  (silu ? backward<true> : backward<false>)(norm, x, dy, dx, dscale, dshift, rows, n);
}

}  // namespace FD_ISA
}  // namespace fastdreamer
