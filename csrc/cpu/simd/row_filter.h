// Minimal filtering (winograd.h) along the rows of images of conv.h, where a window of five taps moves
// by one: four outputs, or five sums of a weight's gradient over four pixels, from eight products.
#ifndef FASTDREAMER_CPU_SIMD_ROW_FILTER_H
#define FASTDREAMER_CPU_SIMD_ROW_FILTER_H

#include "conv.h"
#include "winograd.h"

namespace fastdreamer {
namespace FD_ISA {

typedef Filtering<4, 5> RowOutputs;
typedef Filtering<5, 4> RowGradient;  // of the same samples
constexpr int kTaps = 5, kPixels = 4, kProducts = 8;

static inline bool filters_rows(const Window& window, int64_t W) {
  const bool plain = window.K == kTaps && window.stride == 1 && !window.splits;
  return plain && W % kPixels == 0 && W >= 2 * kPixels;
}

// L times vectors `step` elements apart, plus one if it is not null.
template <const auto& L, int rows, int columns>
static inline void multiply_vectors(
    const float* x, int64_t step, float* y, int64_t y_step, const Vec* plus = nullptr) {
  Vec in[columns];
#pragma GCC unroll 8
  for (int j = 0; j < columns; ++j) in[j] = load(x + j * step);
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
    const Vec sum = row_times<L, columns>(i, in);
    store(y + i * y_step, plus ? sum + *plus : sum);
  }
}

// A convolution's rows, in order.
class ConvRows {
  using F = RowOutputs;

 public:
  // f.weight may be null if there is nothing to convolve.
  ConvRows(const Image& in, const Filter& f)
      : in_(in), filter_(f), tiles_(filters_rows(f.window, in.W()) ? in.W() / kPixels : 0),
        row_(tiles_ * in.C() * kLanes), size_(kTaps * in.C() * f.O) {
    if (tiles_ == 0 || !f.weight) return;
    weights_ = Buffer(kProducts * size_);
    samples_ = Buffer(kProducts * kHeld * row_);
    products_ = Buffer(kProducts * kChunk * f.O * kLanes);
    const int64_t tap = in.C() * f.O;  // weights of one, (kTaps, kTaps, C, O) in all
    for (int p = 0; p < kProducts; ++p)
      for (int64_t i = 0; i < size_; ++i) {
        const float* taps = f.weight + i / tap * kTaps * tap + i % tap;
        float sum = 0;
        for (int k = 0; k < kTaps; ++k) sum += F::kWeights.at[p][k] * taps[k * tap];
        weights_.get()[p * size_ + i] = sum;
      }
  }

  // Rows y .. y + count - 1 of the output behind one another, `width` elements each; from 0 on for
  // every image. A few at a time are faster.
  void next(int64_t y, int64_t count, int64_t width, float* out) {
    if (tiles_ == 0) {
      for (int64_t i = 0; i < count; ++i) conv_row(in_, filter_, y + i, out + i * width);
      return;
    }
    const int64_t C = in_.C(), O = filter_.O, step = O * kLanes, total = count * tiles_;
    hold(y, y + count + kTaps - 1);
    const float* x = samples_.get() + (y - first_) * row_;
    for (int64_t n = 0; n < total; n += kChunk) {
      const int64_t tiles = total - n < kChunk ? total - n : kChunk;
      for (int p = 0; p < kProducts; ++p)
        conv_channels(
            tiles, x + p * kHeld * row_ + n * C * kLanes, row_, C * kLanes, kTaps, C,
            weights_.get() + p * size_, O, nullptr, products_.get() + p * kChunk * step, step);
      for (int64_t t = 0; t < tiles; ++t)
        for (int64_t o = 0; o < O; ++o) {
          const Vec bias = broadcast(filter_.bias ? filter_.bias[o] : 0.0f);
          multiply_vectors<F::kOutputs, kPixels, kProducts>(
              products_.get() + (t * O + o) * kLanes, kChunk * step,
              out + ((n + t) * kPixels * O + o) * kLanes, step, &bias);
        }
    }
  }

 private:
  static constexpr int64_t kHeld = 12;   // rows of samples
  static constexpr int64_t kChunk = 12;  // tiles whose products the cache keeps

  // Samples of the rows begin .. end - 1 of the image within its border.
  void hold(int64_t begin, int64_t end) {
    const int64_t C = in_.C();
    if (begin == 0) first_ = held_ = 0;
    if (end - first_ > kHeld) {
      held_ -= begin - first_;
      for (int p = 0; p < kProducts; ++p) {
        float* rows = samples_.get() + p * kHeld * row_;
        copy(rows + (begin - first_) * row_, rows, held_ * row_);
      }
      first_ = begin;
    }
    for (; first_ + held_ < end; ++held_) {
      const float* x = in_.corner() + (first_ + held_) * in_.row();
      for (int64_t t = 0; t < tiles_; ++t)
        for (int64_t c = 0; c < C; ++c)
          multiply_vectors<F::kSamples, kProducts, kProducts>(
              x + (t * kPixels * C + c) * kLanes, C * kLanes,
              samples_.get() + held_ * row_ + (t * C + c) * kLanes, kHeld * row_);
    }
  }

  const Image& in_;
  Filter filter_;
  int64_t tiles_, row_, size_, first_ = 0, held_ = 0;
  Buffer weights_, samples_, products_;
};

// The gradient of the weights of a window that filters rows.
class RowSums {
  using F = RowGradient;

 public:
  RowSums(const Image& x, const Image& dy)
      : x_(x), dy_(dy), size_(kTaps * x.C() * dy.C()), rows_((dy.H() + kTaps - 1) * x.C() * kLanes),
        columns_(dy.H() * dy.C() * kLanes) {
    constexpr int64_t kCached = 1 << 17;  // elements
    held_ = kCached / (kProducts * (rows_ + columns_)) + 1;
    samples_ = Buffer(kProducts * held_ * rows_);
    pixels_ = Buffer(kProducts * held_ * columns_);
    sums_ = Buffer(kProducts * size_ * kLanes);
    fill(sums_.get(), 0, kProducts * size_ * kLanes);
  }

  // Adds that of the present images.
  void add() {
    const int64_t tiles = dy_.W() / kPixels;
    for (int64_t t = 0; t < tiles; t += held_) {
      const int64_t count = tiles - t < held_ ? tiles - t : held_;
      sample(t, count);
      add_tiles(t, count);
    }
  }

  // dweight (kTaps, kTaps, C, O): the sums over all lanes.
  void finish(float* dweight) const {
    const int64_t tap = x_.C() * dy_.C();
    const Buffer sums(kProducts * size_);
    sum_each(sums_.get(), kProducts * size_, sums.get());
    for (int64_t i = 0; i < size_; ++i)
      for (int k = 0; k < kTaps; ++k) {
        float sum = 0;
        for (int p = 0; p < kProducts; ++p) sum += F::kOutputs.at[k][p] * sums.get()[p * size_ + i];
        dweight[(i / tap * kTaps + k) * tap + i % tap] = sum;
      }
  }

 private:
  // A tile's rows lie behind one another, so that those of a window do.
  void sample(int64_t first, int64_t count) {
    const int64_t C = x_.C(), rows = dy_.H() + kTaps - 1;
    for (int64_t t = 0; t < count; ++t)
      for (int64_t y = 0; y < rows; ++y)
        for (int64_t c = 0; c < C; ++c)
          multiply_vectors<F::kSamples, kProducts, kProducts>(
              x_.corner() + y * x_.row() + ((first + t) * kPixels * C + c) * kLanes, C * kLanes,
              samples_.get() + t * rows_ + (y * C + c) * kLanes, held_ * rows_);
  }

  void add_tiles(int64_t first, int64_t count) {
    const int64_t C = x_.C(), O = dy_.C(), H = dy_.H();
    for (int64_t o = 0; o < O;) {
      const int64_t right = gradient_channels(O - o);
      float* to = pixels_.get();
      for (int64_t t = first; t < first + count; ++t)
        for (int64_t y = 0; y < H; ++y)
          for (int64_t b = 0; b < right; ++b, to += kLanes)
            multiply_vectors<F::kWeights, kProducts, kPixels>(
                dy_.at(y) + (t * kPixels * O + o + b) * kLanes, O * kLanes, to, held_ * columns_);
      for (int p = 0; p < kProducts; ++p)
        gradient_rows(right)(
            kTaps * C, count, H, samples_.get() + p * held_ * rows_, rows_, C * kLanes,
            pixels_.get() + p * held_ * columns_, sums_.get() + (p * size_ + o) * kLanes, O);
      o += right;
    }
  }

  const Image &x_, &dy_;
  int64_t size_, rows_, columns_, held_;
  Buffer samples_, pixels_, sums_;
};

}  // namespace FD_ISA
}  // namespace fastdreamer

#endif
