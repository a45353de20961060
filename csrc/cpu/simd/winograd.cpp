// Convolutions by minimal filtering: tiles to T x T matrices with a row for each tile, products of
// these with the weights' matrices, and back.
#include "../winograd.h"
#include "winograd.h"

namespace fastdreamer {
namespace FD_ISA {
namespace {

constexpr int64_t kSkew = 16;  // elements between rows and matrices, or they share a cache's set
constexpr int64_t kLeastBlock = 1 << 17, kMostBlock = 1 << 22;  // elements

// The first output of a tile.
struct Corner {
  int64_t image, y, x;
};

Corner corner_of(const Winograd& w, int64_t tile) {
  const int64_t row = tile / w.columns;
  return {row / w.rows, row % w.rows * w.m, tile % w.columns * w.m};
}

// Images of H x W pixels of C channels.
template <typename scalar>
struct Map {
  scalar* data;
  int64_t H, W, C;
};

template <typename scalar>
Map<scalar> image_of(const Map<scalar>& map, int64_t image) {
  return {map.data + image * map.H * map.W * map.C, map.H, map.W, map.C};
}

// Where the pixels y + i step, x + j step of an image are, or `outside`.
template <int count, typename scalar>
void locate(
    const Map<scalar>& image, int64_t y, int64_t x, int64_t step, scalar* outside,
    scalar* (&at)[count][count]) {
  for (int i = 0; i < count; ++i)
    for (int j = 0; j < count; ++j) {
      const int64_t row = y + i * step, column = x + j * step;
      const bool inside = row >= 0 && row < image.H && column >= 0 && column < image.W;
      at[i][j] = inside ? image.data + (row * image.W + column) * image.C : outside;
    }
}

// Images to be filtered, or whose gradient is: as they are, or what a pooling left of them.
class Source {
 public:
  Source(const float* data, const uint8_t* index, int64_t H, int64_t W, int64_t C)
      : map_{data, index ? H / 2 : H, index ? W / 2 : W, C}, index_(index), zeros_(C),
        pixels_(index ? H * W * C : 0) {
    for (int64_t c = 0; c < C; ++c) zeros_.get()[c] = 0.0f;
  }
  const float* zeros() const { return zeros_.get(); }  // a pixel
  Map<const float> image(int64_t i) {
    if (!index_) return image_of(map_, i);
    if (i != current_) unpool(i);
    current_ = i;
    return {pixels_.get(), 2 * map_.H, 2 * map_.W, map_.C};
  }

 private:
  void unpool(int64_t i) {
    const int64_t row = 2 * map_.W * map_.C;  // of the image before pooling
    for (int64_t y = 0; y < map_.H; ++y)
      for (int64_t x = 0; x < map_.W; ++x) {
        const int64_t pixel = ((i * map_.H + y) * map_.W + x) * map_.C;
        float* to = pixels_.get() + 2 * y * row + 2 * x * map_.C;
        by_vectors(map_.C, [&](int64_t c, int n) {
          const IntVec which = load_bytes(index_ + pixel + c, n);
          const Vec v = load_some(map_.data + pixel + c, n);
          for (int k = 0; k < 4; ++k)
            store_some(
                to + k / 2 * row + k % 2 * map_.C + c, which == IntVec{} + k ? v : Vec{}, n);
        });
      }
  }

  Map<const float> map_;
  const uint8_t* index_;  // of the pooling, or null
  Buffer zeros_, pixels_;
  int64_t current_ = -1;  // image whose pixels these are
};

// A tile's pixels from y, x on, `step` apart, times L on both sides, to `to`: channels side by side,
// filled up with zeros; its elements `plane` apart.
template <const auto& L, int rows, int columns>
void transform(
    const Map<const float>& image, const float* zeros, int64_t y, int64_t x, int64_t step,
    float* to, int64_t plane) {
  const float* at[columns][columns];
  locate<columns>(image, y, x, step, zeros, at);
  by_vectors(image.C, [&](int64_t c, int n) {
    multiply_both<L, rows, columns>(
        [&](int i, int j) { return load_some(at[i][j] + c, n); },
        [&](int i, int j, Vec v) { store(to + (i * rows + j) * plane + c, v); });
  });
  for (int64_t c = round_up(image.C, kLanes); c < round_up(image.C, 16); c += kLanes)
    for (int i = 0; i < rows * rows; ++i) store(to + i * plane + c, Vec{});
}

// The tile's samples of all inputs of a group, one after the other.
template <typename F>
void transform_samples(
    const Winograd& w, int64_t group, Source& from, const Corner& at, float* to, int64_t plane) {
  const int64_t step = w.window.stride, y = step * at.y - w.window.border,
                x = step * at.x - w.window.border;
  const Map<const float> image = from.image(at.image);
  for (int64_t p = group; p < group + w.ins; ++p, to += w.padded_C)
    transform<F::kSamples, F::T, F::T>(
        image, from.zeros(), y + p / 2, x + p % 2, step, to, plane);
}

// Outputs of all parities of a group from the tile's products.
template <typename F>
void transform_outputs(
    const Winograd& w, int64_t group, const float* from, int64_t plane, const float* bias,
    const Corner& at, const Map<float>& y, float* outside) {
  const int64_t step = w.window.splits ? 2 : 1;
  for (int64_t p = group; p < group + w.outs; ++p, from += w.padded_O) {
    float* to[F::m][F::m];
    locate<F::m>(
        image_of(y, at.image), step * at.y + p / 2, step * at.x + p % 2, step, outside, to);
    by_vectors(w.O, [&](int64_t o, int n) {
      const Vec b = bias ? load_some(bias + o, n) : Vec{};
      multiply_both<F::kOutputs, F::m, F::T>(
          [&](int i, int j) { return load(from + (i * F::T + j) * plane + o); },
          [&](int i, int j, Vec v) { store_some(to[i][j] + o, v + b, n); });
    });
  }
}

// The largest output of a tile of 2x2, the first of equals or a NaN, and its number.
template <typename F>
void pool_outputs(
    const Winograd& w, const float* from, int64_t plane, const float* bias, int64_t tile, float* y,
    uint8_t* index) {
  by_vectors(w.O, [&](int64_t o, int n) {
    Vec out[4];
    multiply_both<F::kOutputs, F::m, F::T>(
        [&](int i, int j) { return load(from + (i * F::T + j) * plane + o); },
        [&](int i, int j, Vec v) { out[2 * i + j] = v; });
    Vec best = out[0];
    IntVec which{};
    for (int k = 1; k < 4; ++k) {
      const IntVec larger = (out[k] > best) | (out[k] != out[k]);
      best = larger ? out[k] : best;
      which = larger ? IntVec{} + k : which;
    }
    store_some(y + tile * w.O + o, bias ? best + load_some(bias + o, n) : best, n);
    store_bytes(index + tile * w.O + o, which, n);
  });
}

// Tiles of a block: it takes as much memory as the right matrices, which every block reads; the
// least stays in the second cache.
int64_t block_tiles(const Winograd& w, int64_t tiles) {
  const int64_t elements = w.weights < kLeastBlock  ? kLeastBlock
                           : w.weights > kMostBlock ? kMostBlock
                                                    : w.weights;
  const int64_t count = round_up(elements / (w.T * w.T * (w.depth + w.width)) + 1, kTile);
  return count < tiles ? count : tiles;
}

template <typename F>
void filter(
    const Winograd& w, Source& x, const float* weight, const float* bias, float* y,
    uint8_t* index, int64_t begin, int64_t end) {
  constexpr int TT = F::T * F::T;
  const int64_t block = block_tiles(w, end - begin);
  const int64_t left = w.depth + kSkew, right = w.width + kSkew;
  const int64_t left_plane = block * left + kSkew, right_plane = block * right + kSkew;
  const Buffer samples(TT * left_plane), products(TT * right_plane), outside(w.padded_O);
  const int64_t scale = w.window.splits ? 2 : 1;
  const Map<float> to{y, scale * w.H / w.window.stride, scale * w.W / w.window.stride, w.O};
  for (int64_t first = begin; first < end; first += block) {
    const int64_t count = end - first < block ? end - first : block;
    for (int64_t g = 0; g < w.groups; ++g) {
      for (int64_t i = 0; i < count; ++i)
        transform_samples<F>(
            w, g, x, corner_of(w, first + i), samples.get() + i * left, left_plane);
      for (int64_t t = 0; t < TT; ++t)
        product<false>(
            count, w.width, w.depth, samples.get() + t * left_plane, left,
            weight + g * w.weights + t * w.depth * w.width, 0, products.get() + t * right_plane,
            right, false);
      for (int64_t i = 0; i < count; ++i) {
        const float* from = products.get() + i * right;
        if constexpr (F::R == 5) {
          if (index) {
            pool_outputs<F>(w, from, right_plane, bias, first + i, y, index);
            continue;
          }
        }
        transform_outputs<F>(
            w, g, from, right_plane, bias, corner_of(w, first + i), to, outside.get());
      }
    }
  }
}

template <typename F>
void gradient(
    const Winograd& w, Source& x, Source& dy, int64_t begin, int64_t end, float* sums) {
  constexpr int TT = F::T * F::T;
  const int64_t block = block_tiles(w, end - begin);
  const int64_t left = w.depth + kSkew, right = w.width + kSkew;
  const int64_t left_plane = block * left + kSkew, right_plane = block * right + kSkew;
  const Buffer samples(TT * left_plane), outputs(TT * right_plane);
  for (int64_t first = begin; first < end; first += block) {
    const int64_t count = end - first < block ? end - first : block;
    for (int64_t i = 0; i < count; ++i) {
      const Corner at = corner_of(w, first + i);
      transform_samples<F>(w, 0, x, at, samples.get() + i * left, left_plane);
      transform<F::kOutputsBack, F::T, F::m>(
          dy.image(at.image), dy.zeros(), at.y, at.x, 1, outputs.get() + i * right, right_plane);
    }
    for (int64_t t = 0; t < TT; ++t)
      product<true>(
          w.depth, w.width, count, samples.get() + t * left_plane, left,
          outputs.get() + t * right_plane, right, sums + t * w.depth * w.width, w.width,
          first > begin);
  }
}

// Right matrices of the channels begin .. end - 1, in the panels that `product` reads.
template <typename F>
void pack(const Winograd& w, const float* weight, int64_t begin, int64_t end, float* packed) {
  const int64_t K = w.window.K, stride = w.window.stride, size = w.depth * w.width;
  const auto column = [&](int64_t group, int64_t phase, int64_t c, int64_t n, float* to) {
    const int64_t out = group + n / w.padded_O, o = n % w.padded_O;
    const int64_t left = c < w.C && o < w.O ? w.O - o : 0;
    const int some = static_cast<int>(left < kLanes ? left : kLanes);
    multiply_both<F::kWeights, F::T, F::R>(
        [&](int i, int j) {
          const int64_t row = out * K + i * stride + phase / 2, tap = j * stride + phase % 2;
          return load_some(weight + ((row * K + tap) * w.C + c) * w.O + o, some);
        },
        [&](int i, int j, Vec x) { store(to + (i * F::T + j) * size, x); });
  };
  for (int64_t g = 0; g < w.groups; ++g)
    for (int64_t phase = 0; phase < w.ins; ++phase)
      for (int64_t c = begin; c < end; ++c)
        for (int64_t n = 0, vectors; n < w.width; n += vectors * kLanes) {
          vectors = panel_vectors((w.width - n) / kLanes);
          const int64_t row = (phase * w.padded_C + c) * vectors * kLanes;
          for (int64_t v = 0; v < vectors * kLanes; v += kLanes)
            column(g, phase, c, n + v, packed + g * w.weights + n * w.depth + row + v);
        }
}

// The weights' gradient (K, K, C, O) of the channels begin .. end - 1 from the parts' sums.
template <typename F>
void unpack(
    const Winograd& w, const float* sums, int64_t parts, int64_t begin, int64_t end,
    float* dweight) {
  const int64_t K = w.window.K, stride = w.window.stride;
  for (int64_t phase = 0; phase < w.ins; ++phase)
    for (int64_t c = begin; c < end; ++c)
      by_vectors(w.O, [&](int64_t o, int n) {
        const float* from = sums + (phase * w.padded_C + c) * w.width + o;
        multiply_both<F::kWeightsBack, F::R, F::T>(
            [&](int i, int j) {
              const float* p = from + (i * F::T + j) * w.depth * w.width;
              Vec sum = load(p);
              for (int64_t part = 1; part < parts; ++part) sum += load(p + part * w.weights);
              return sum;
            },
            [&](int i, int j, Vec x) {
              const int64_t row = i * stride + phase / 2, tap = j * stride + phase % 2;
              store_some(dweight + ((row * K + tap) * w.C + c) * w.O + o, x, n);
            });
      });
}

// Calls body(filtering) with the type for a window.
template <typename Body>
void with_filtering(const Winograd& w, const Body& body) {
  if (w.R == 2) body(Filtering<4, 2>());
  else if (w.R == 3) body(Filtering<4, 3>());
  else body(Filtering<2, 5>());
}

}  // namespace

// Input channels begin .. end - 1 of the weights (K, K, C, O), or of (2, 2, K, K, C, O).
void winograd_pack(
    const Winograd& w, const float* weight, int64_t begin, int64_t end, float* packed) {
  with_filtering(w, [&](auto f) { pack<decltype(f)>(w, weight, begin, end, packed); });
}

// Tiles begin .. end - 1, of x or, with `pooled`, of what a pooling left of it; with `index`, pools.
void winograd(
    const Winograd& w, const float* x, const uint8_t* pooled, const float* packed,
    const float* bias, float* y, uint8_t* index, int64_t begin, int64_t end) {
  Source from(x, pooled, w.H, w.W, w.C);
  with_filtering(w, [&](auto f) {
    filter<decltype(f)>(w, from, packed, bias, y, index, begin, end);
  });
}

// Sums over the tiles begin .. end - 1, from x and the gradient of its window's outputs, or what a
// pooling left of it.
void winograd_gradient(
    const Winograd& w, const float* x, const float* dy, const uint8_t* pooled, int64_t begin,
    int64_t end, float* sums) {
  Source from(x, nullptr, w.H, w.W, w.C);
  Source to(dy, pooled, w.H / w.window.stride, w.W / w.window.stride, w.O);
  with_filtering(w, [&](auto f) { gradient<decltype(f)>(w, from, to, begin, end, sums); });
}

// The weights' gradient of the channels begin .. end - 1.
void winograd_unpack(
    const Winograd& w, const float* sums, int64_t parts, int64_t begin, int64_t end,
    float* dweight) {
  with_filtering(w, [&](auto f) { unpack<decltype(f)>(w, sums, parts, begin, end, dweight); });
}

}  // namespace FD_ISA
}  // namespace fastdreamer
