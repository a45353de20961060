// LayerNorm or RMSNorm of rows with a SiLU behind it, on the way into shared memory, and the sums
// over a row of which each block of a team has a part.
//   xhat = (x - mean) r,  r = 1 / sqrt(var + eps);  RMSNorm: mean = 0, var = the mean square
//   n = xhat scale + shift,  y = n or n sigmoid(n)
#ifndef FASTDREAMER_CUDA_NORM_H
#define FASTDREAMER_CUDA_NORM_H

#include <math.h>

#include "product.h"

namespace fastdreamer {

struct Norm {
  const float* scale;
  const float* shift;  // null: none
  int width;
  bool centred;  // LayerNorm
  float eps;
};

struct Moments {
  float mean, r;
};

FD_FN float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

FD_FN float normalise(const Norm& norm, Moments m, float x, int i) {
  const float v = (x - m.mean) * m.r * norm.scale[i];
  return norm.shift ? v + norm.shift[i] : v;
}
FD_FN float silu(float x) { return x * sigmoid(x); }

// The sum over a warp of f(i) for i = 0 .. n - 1.
template <typename F>
FD_FN float warp_total(int n, const F& f) {
  Lanes<Sum> part;
  by_lane([&](int lane, int slot) {
    float total = 0;
    for (int i = lane; i < n; i += kWarp) total += f(i);
    part.value[slot].value = total;
  });
  return warp_sum(part);
}

// A warp's moments of a row.
FD_FN Moments row_moments(const Norm& norm, const float* x) {
  Moments m{0, 0};
  if (norm.centred) m.mean = warp_total(norm.width, [&](int i) { return x[i]; }) / norm.width;
  const float squares = warp_total(
      norm.width, [&](int i) { return (x[i] - m.mean) * (x[i] - m.mean); });
  m.r = 1.0f / sqrtf(squares / norm.width + norm.eps);
  return m;
}

// A block's share of rows' moments: how many columns, their mean, their squared distances from it.
struct Share {
  float count, mean, squares;
};

// Of the block's columns of p: shares[row] for `rows` rows at x(row).
template <typename Block, typename X>
FD_FN void share_moments(
    const Block& b, const Product& p, bool centred, int rows, const X& x, Share* shares) {
  const Slice slice = slice_of(b, p);
  const int width = slice.tiles() * kTileColumns;
  const auto column = [&](int i) {
    return p.column(slice.first + i / kTileColumns, i % kTileColumns);
  };
  for (int row = b.warp(); row < rows; row += b.warps()) {
    const float* at = x(row);
    Share share{0, 0, 0};
    share.count = warp_total(width, [&](int i) { return column(i) < 0 ? 0.0f : 1.0f; });
    if (centred && share.count > 0)
      share.mean =
          warp_total(width, [&](int i) { return column(i) < 0 ? 0.0f : at[column(i)]; }) / share.count;
    share.squares = warp_total(width, [&](int i) {
      const float d = column(i) < 0 ? 0.0f : at[column(i)] - share.mean;
      return d * d;
    });
    by_lane([&](int lane, int) {
      if (lane == 0) shares[row] = share;
    });
  }
}

// The moments of rows from all blocks' shares (members, stride), into shared memory; synchronises.
template <typename Block>
FD_FN void join_moments(
    const Block& b, const Norm& norm, int rows, const Share* shares, int stride, Moments* moments) {
  for (int row = b.warp(); row < rows; row += b.warps()) {
    const auto share = [&](int i) -> const Share& { return shares[i * stride + row]; };
    const float mean =
        warp_total(b.members, [&](int i) { return share(i).count * share(i).mean; }) / norm.width;
    const float squares = warp_total(b.members, [&](int i) {
      const float d = share(i).mean - mean;
      return share(i).squares + share(i).count * d * d;
    });
    by_lane([&](int lane, int) {
      if (lane == 0) moments[row] = {mean, 1.0f / sqrtf(squares / norm.width + norm.eps)};
    });
  }
  b.sync();
}

// Rows in shared memory as a product takes them: `rows` filled, the others of the tiles 0, columns
// from..from + padded - 1 of each, those behind `width` 0. value(row, i) for i < width.
template <typename Compute, int MT, typename Block, typename Value>
FD_FN void stage(
    const Block& b, const Memory<Compute, MT>& memory, int stride, int from, int width, int padded,
    int rows, const Value& value) {
  typename Compute::Scalar* to = memory.rows();
  for (int i = b.thread(); i < Memory<Compute, MT>::kRows * padded; i += b.threads()) {
    const int row = i / padded, at = i % padded;
    to[row * stride + from + at] = Compute::from(row < rows && at < width ? value(row, at) : 0.0f);
  }
}

// The same for rows x(row) behind `count` norms of equal width side by side, with SiLU.
template <typename Compute, int MT, typename Block, typename X>
FD_FN void stage_norms(
    const Block& b, const Memory<Compute, MT>& memory, int stride, int from, int padded,
    const Norm* norms, int count, int rows, const X& x) {
  typename Compute::Scalar* to = memory.rows() + from;
  const int width = norms[0].width;
  for (int row = b.warp(); row < Memory<Compute, MT>::kRows; row += b.warps()) {
    for (int n = 0; n < count && row < rows; ++n) {
      const float* at = x(row) + n * width;
      const Moments m = row_moments(norms[n], at);
      by_lane([&](int lane, int) {
        for (int i = lane; i < width; i += kWarp)
          to[row * stride + n * width + i] =
              Compute::from(silu(normalise(norms[n], m, at[i], i)));
      });
    }
    by_lane([&](int lane, int) {
      for (int i = (row < rows ? count * width : 0) + lane; i < padded; i += kWarp)
        to[row * stride + i] = Compute::from(0.0f);
    });
  }
}

// The sums over a row that a norm's gradient needs: of dxhat, and of dxhat xhat.
struct Slope {
  float total, along;
};

FD_FN float norm_gradient(const Norm& norm, Moments m, Slope slope, float x, float dn, int i) {
  const float xhat = (x - m.mean) * m.r, mean = norm.centred ? slope.total / norm.width : 0.0f;
  return (dn * norm.scale[i] - mean - xhat * (slope.along / norm.width)) * m.r;
}

// The gradient of n from dy, that of y = silu(n).
FD_FN float silu_gradient(const Norm& norm, Moments m, float x, float dy, int i) {
  const float v = normalise(norm, m, x, i), s = sigmoid(v);
  return dy * s * (1.0f + v * (1.0f - s));
}

// Of the block's columns begin .. begin + norm.width - 1 of p: their share slopes[row] of a row's
// sums from dn(row), and dscale and dshift += the sums over rows. Moments at moments(row).
template <typename Block, typename X, typename DN, typename M>
FD_FN void share_slopes(
    const Block& b, const Product& p, const Norm& norm, int begin, int rows, const X& x,
    const DN& dn, const M& moments, Slope* slopes, float* dscale, float* dshift) {
  const Slice slice = slice_of(b, p);
  const int width = slice.tiles() * kTileColumns;
  const auto column = [&](int i) {
    const int at = p.column(slice.first + i / kTileColumns, i % kTileColumns) - begin;
    return at < norm.width ? at : -1;
  };
  for (int row = b.warp(); row < rows; row += b.warps()) {
    const float *at = x(row) + begin, *d = dn(row) + begin;
    const Moments m = moments(row);
    const auto dxhat = [&](int i) {
      return column(i) < 0 ? 0.0f : d[column(i)] * norm.scale[column(i)];
    };
    Slope slope;
    slope.total = warp_total(width, dxhat);
    slope.along = warp_total(width, [&](int i) {
      return column(i) < 0 ? 0.0f : dxhat(i) * (at[column(i)] - m.mean) * m.r;
    });
    by_lane([&](int lane, int) {
      if (lane == 0) slopes[row] = slope;
    });
  }
  for (int i = b.thread(); i < width; i += b.threads()) {
    const int at = column(i);
    if (at < 0) continue;
    float along = 0, total = 0;
    for (int row = 0; row < rows; ++row) {
      const Moments m = moments(row);
      const float d = dn(row)[begin + at];
      along += d * (x(row)[begin + at] - m.mean) * m.r;
      total += d;
    }
    dscale[at] += along;
    if (norm.shift) dshift[at] += total;
  }
}

// The sums of rows from all blocks' shares (members, stride), into shared memory; synchronises.
template <typename Block>
FD_FN void join_slopes(const Block& b, int rows, const Slope* slopes, int stride, Slope* joined) {
  for (int row = b.warp(); row < rows; row += b.warps()) {
    const float total = warp_total(b.members, [&](int i) { return slopes[i * stride + row].total; });
    const float along = warp_total(b.members, [&](int i) { return slopes[i * stride + row].along; });
    by_lane([&](int lane, int) {
      if (lane == 0) joined[row] = {total, along};
    });
  }
  b.sync();
}

}  // namespace fastdreamer

#endif
