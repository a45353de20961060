// Convolutions of kLanes images at once, an image to a lane: whatever the number of channels, no
// lane idles, and sums over channels need no shuffling. An image is rows of columns of channels, a
// vector for each; the window's columns and channels lie side by side, so that one loop covers both.
#ifndef FASTDREAMER_CPU_SIMD_CONV_H
#define FASTDREAMER_CPU_SIMD_CONV_H

#include "../conv.h"
#include "gemm.h"
#include "half.h"
#include "lanes.h"

namespace fastdreamer {
namespace FD_ISA {

// kLanes images within a border of zeros.
class Image {
 public:
  Image(int64_t H, int64_t W, int64_t C, int64_t border)
      : H_(H), W_(W), C_(C), border_(border), data_((H + 2 * border) * row()) {
    float* p = data_.get();
    for (int64_t i = 0; i < (H + 2 * border) * row(); ++i) p[i] = 0.0f;
  }
  int64_t H() const { return H_; }
  int64_t W() const { return W_; }
  int64_t C() const { return C_; }
  int64_t row() const { return (W_ + 2 * border_) * C_ * kLanes; }  // elements from row to row
  const float* corner() const { return data_.get(); }               // of the border
  float* at(int64_t y) const {
    return data_.get() + (y + border_) * row() + border_ * C_ * kLanes;
  }

 private:
  int64_t H_, W_, C_, border_;
  Buffer data_;
};

// Elements of images: float, half for bfloat16, uint8_t for pixels.
enum half : uint16_t {};

static inline float element(float x) { return x; }
static inline float element(half x) {
  return reinterpret_cast<Vec>(UintVec{} + (static_cast<uint32_t>(x) << 16))[0];
}
static inline float element(uint8_t x) { return x / 255.0f - 0.5f; }
static inline void set(float& y, float x) { y = x; }
static inline void set(half& y, float x) { y = static_cast<half>(rounded(broadcast(x))[0] >> 16); }

typedef float Words __attribute__((vector_size(4 * kLanes), aligned(1), may_alias));

// A vector of the transposed words of rows, as elements: a float is one, halves are two, pixels four.
static inline void store_words(float, Vec word, float* out) { store(out, word); }
static inline void store_words(half, Vec word, float* out) {
  const UintVec two = reinterpret_cast<UintVec>(word);
  store(out, reinterpret_cast<Vec>(two << 16));
  store(out + kLanes, reinterpret_cast<Vec>(two & 0xffff0000));
}
static inline void store_words(uint8_t, Vec word, float* out) {
  for (int i = 0; i < 4; ++i) {
    const Vec x = __builtin_convertvector((bits(word) >> 8 * i) & 255, Vec);
    store(out + i * kLanes, x / 255.0f - 0.5f);
  }
}

static inline Vec load_words(float, const float* in) { return load(in); }
static inline Vec load_words(half, const float* in) {
  return reinterpret_cast<Vec>(rounded(load(in)) >> 16 | rounded(load(in + kLanes)));
}

// `count` elements of each of the first `images` images, which lie `stride` apart, to lanes; lanes
// without an image become 0, or what a 0 of uint8 is.
template <typename scalar>
static inline void read_lanes(
    const scalar* x, int64_t stride, int images, int64_t count, float* out) {
  constexpr int inside = 4 / sizeof(scalar);  // elements of a word
  int64_t j = 0;
  for (; j + kLanes * inside <= count; j += kLanes * inside) {
    Vec v[kLanes];
    for (int i = 0; i < kLanes; ++i)
      v[i] = i < images ? *reinterpret_cast<const Words*>(x + i * stride + j) : Vec{};
    transpose<kLanes>(v);
    for (int i = 0; i < kLanes; ++i) store_words(scalar(), v[i], out + (j + i * inside) * kLanes);
  }
  for (; j < count; ++j)
    for (int i = 0; i < kLanes; ++i) out[j * kLanes + i] = element(i < images ? x[i * stride + j] : scalar());
}

template <typename scalar>
static inline void write_lanes(
    scalar* y, int64_t stride, int images, int64_t count, const float* in) {
  constexpr int inside = 4 / sizeof(scalar);
  int64_t j = 0;
  for (; j + kLanes * inside <= count; j += kLanes * inside) {
    Vec v[kLanes];
    for (int i = 0; i < kLanes; ++i) v[i] = load_words(scalar(), in + (j + i * inside) * kLanes);
    transpose<kLanes>(v);
    for (int i = 0; i < images; ++i) *reinterpret_cast<Words*>(y + i * stride + j) = v[i];
  }
  for (; j < count; ++j)
    for (int i = 0; i < images; ++i) set(y[i * stride + j], in[j * kLanes + i]);
}

struct Filter {
  Window window;
  const float* weight;  // (K, K, C, O), or (2, 2, K, K, C, O) where it splits
  const float* bias;    // (O,) or null
  int64_t O;
};

constexpr int kChannels = 6;  // output channels of a tile
// Columns of a tile, for as many sums as the registers hold.
constexpr int tile_columns(int channels) {
  return kLanes == 16 ? (channels > 4 ? 4 : channels > 3 ? 6 : 8) : channels > 4 ? 2 : channels > 3 ? 3 : 4;
}

// columns x channels of an output row, `step` apart; x_step and x_row are between windows and
// between a window's rows, of J = K C vectors.
template <int channels, int columns>
static inline void conv_tile(
    const float* x, int64_t x_row, int64_t x_step, int64_t K, int64_t J, const float* weight,
    int64_t O, const float* bias, float* y, int64_t step) {
  Vec sums[columns][channels];
#pragma GCC unroll 8
  for (int c = 0; c < channels; ++c) {
    const Vec b = broadcast(bias ? bias[c] : 0.0f);
#pragma GCC unroll 8
    for (int i = 0; i < columns; ++i) sums[i][c] = b;
  }
  for (int64_t k = 0; k < K; ++k, x += x_row)
    for (int64_t j = 0; j < J; ++j, weight += O) {
      Vec v[columns];
#pragma GCC unroll 8
      for (int i = 0; i < columns; ++i) v[i] = load(x + i * x_step + j * kLanes);
#pragma GCC unroll 8
      for (int c = 0; c < channels; ++c) {
        const Vec w = broadcast(weight[c]);
#pragma GCC unroll 8
        for (int i = 0; i < columns; ++i) sums[i][c] += v[i] * w;
      }
    }
#pragma GCC unroll 8
  for (int i = 0; i < columns; ++i)
#pragma GCC unroll 8
    for (int c = 0; c < channels; ++c) store(y + i * step + c * kLanes, sums[i][c]);
}

template <int channels, int columns = tile_columns(channels)>
static inline void conv_columns(
    int64_t count, const float* x, int64_t x_row, int64_t x_step, int64_t K, int64_t J,
    const float* weight, int64_t O, const float* bias, float* y, int64_t step) {
  if constexpr (columns > 0) {
    int64_t i = 0;
    for (; i + columns <= count; i += columns)
      conv_tile<channels, columns>(
          x + i * x_step, x_row, x_step, K, J, weight, O, bias, y + i * step, step);
    conv_columns<channels, columns - 1>(
        count - i, x + i * x_step, x_row, x_step, K, J, weight, O, bias, y + i * step, step);
  }
}

static inline void conv_channels(
    int64_t count, const float* x, int64_t x_row, int64_t x_step, int64_t K, int64_t J,
    const float* weight, int64_t O, const float* bias, float* y, int64_t step) {
  for (int64_t o = 0; o < O;) {
    const int64_t tiles = (O - o + kChannels - 1) / kChannels, channels = (O - o + tiles - 1) / tiles;
    const auto tile = channels == 1   ? conv_columns<1>
                      : channels == 2 ? conv_columns<2>
                      : channels == 3 ? conv_columns<3>
                      : channels == 4 ? conv_columns<4>
                      : channels == 5 ? conv_columns<5>
                                      : conv_columns<6>;
    tile(
        count, x, x_row, x_step, K, J, weight + o, O, bias ? bias + o : nullptr, y + o * kLanes,
        step);
    o += channels;
  }
}

// Row y of the output, (columns, O) vectors; a few columns at a time, that the cache keeps while all
// channels pass.
static inline void conv_row(const Image& in, const Filter& f, int64_t y, float* out) {
  constexpr int64_t kChunk = 24;
  const auto [border, K, stride, splits, shifts] = f.window;
  const int64_t J = K * in.C(), column = in.C() * kLanes, size = K * J * f.O, step = f.O * kLanes;
  const int64_t columns = in.W() / stride, parities = splits ? 2 : 1, odd = splits ? y % 2 : 0;
  const float* x = in.corner() + (y / parities * stride + (shifts ? odd : 0)) * in.row();
  for (int64_t i = 0; i < columns; i += kChunk)
    for (int64_t right = 0; right < parities; ++right)
      conv_channels(
          columns - i < kChunk ? columns - i : kChunk,
          x + (i * stride + (shifts ? right : 0)) * column, in.row(), stride * column, K, J,
          f.weight + (2 * odd + right) * size, f.O, f.bias, out + (i * parities + right) * step,
          parities * step);
}

// Tiles of a weight's gradient.
constexpr int kRight = kLanes == 16 ? 6 : 4;
constexpr int tile_left(int right) {
  return kLanes == 16 ? (right > 4 ? 4 : right > 3 ? 6 : 8) : right > 3 ? 3 : 4;
}

// dweight[a][b], `width` vectors from a to a, += sum over rows and columns of x[a] dy[b]; the dy of
// one after the other.
template <int right, int left>
static inline void gradient_tile(
    int64_t rows, int64_t columns, const float* x, int64_t x_row, int64_t x_step, const float* dy,
    float* dweight, int64_t width) {
  Vec sums[left][right];
#pragma GCC unroll 8
  for (int a = 0; a < left; ++a)
#pragma GCC unroll 8
    for (int b = 0; b < right; ++b) sums[a][b] = Vec{};
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < columns; ++i, dy += right * kLanes) {
      Vec v[left];
#pragma GCC unroll 8
      for (int a = 0; a < left; ++a) v[a] = load(x + r * x_row + i * x_step + a * kLanes);
#pragma GCC unroll 8
      for (int b = 0; b < right; ++b) {
        const Vec d = load(dy + b * kLanes);
#pragma GCC unroll 8
        for (int a = 0; a < left; ++a) sums[a][b] += v[a] * d;
      }
    }
#pragma GCC unroll 8
  for (int a = 0; a < left; ++a)
#pragma GCC unroll 8
    for (int b = 0; b < right; ++b) {
      float* p = dweight + (a * width + b) * kLanes;
      store(p, load(p) + sums[a][b]);
    }
}

template <int right, int left = tile_left(right)>
static inline void gradient_row(
    int64_t J, int64_t rows, int64_t columns, const float* x, int64_t x_row, int64_t x_step,
    const float* dy, float* dweight, int64_t width) {
  if constexpr (left > 0) {
    int64_t j = 0;
    for (; j + left <= J; j += left)
      gradient_tile<right, left>(
          rows, columns, x + j * kLanes, x_row, x_step, dy, dweight + j * width * kLanes, width);
    gradient_row<right, left - 1>(
        J - j, rows, columns, x + j * kLanes, x_row, x_step, dy, dweight + j * width * kLanes,
        width);
  }
}

// Channels of dy of the next tile, where O are left, and the function that takes them.
static inline int64_t gradient_channels(int64_t O) {
  const int64_t tiles = (O + kRight - 1) / kRight;
  return (O + tiles - 1) / tiles;
}
static inline auto gradient_rows(int64_t right) {
  return right == 1   ? gradient_row<1>
         : right == 2 ? gradient_row<2>
         : right == 3 ? gradient_row<3>
         : right == 4 ? gradient_row<4>
         : right == 5 ? gradient_row<5>
                      : gradient_row<6>;
}

// Adds the gradient of the weights (K, K, C, O) of a window over `x`, which gave images of dy's
// size: a vector for each.
static inline void add_weight_gradient(
    const Image& x, const Image& dy, int64_t K, int64_t stride, float* dweight) {
  constexpr int64_t kCached = 64;  // pixels whose dy the cache keeps while all of x passes
  const int64_t J = K * x.C(), O = dy.C(), step = kCached / dy.W() > 0 ? kCached / dy.W() : 1;
  const Buffer packed(step * dy.W() * kRight * kLanes);
  for (int64_t o = 0; o < O;) {
    const int64_t right = gradient_channels(O - o);
    for (int64_t y = 0; y < dy.H(); y += step) {
      const int64_t rows = dy.H() - y < step ? dy.H() - y : step;
      float* to = packed.get();
      for (int64_t r = y; r < y + rows; ++r)
        for (int64_t i = 0; i < dy.W(); ++i)
          for (int64_t b = 0; b < right; ++b, to += kLanes)
            store(to, load(dy.at(r) + (i * O + o + b) * kLanes));
      for (int64_t k = 0; k < K; ++k)
        gradient_rows(right)(
            J, rows, dy.W(), x.corner() + (y * stride + k) * x.row(), stride * x.row(),
            stride * x.C() * kLanes, packed.get(), dweight + (k * J * O + o) * kLanes, O);
    }
    o += right;
  }
}

// Sums over the lanes of `count` vectors.
static inline void sum_each(const float* lanes, int64_t count, float* sums) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    Vec v[kLanes], total{};
    for (int k = 0; k < kLanes; ++k) v[k] = load(lanes + (i + k) * kLanes);
    transpose<kLanes>(v);
    for (int k = 0; k < kLanes; ++k) total += v[k];
    store(sums + i, total);
  }
  for (; i < count; ++i) sums[i] = sum(load(lanes + i * kLanes));
}

}  // namespace FD_ISA
}  // namespace fastdreamer

#endif
