// Convolutions by minimal filtering: tiles to T x T matrices with a row for each tile, products with
// the weights' matrices, and back. A block of tiles stays in the cache.
#include "../winograd.h"
#include "winograd.h"

namespace fastdreamer {
namespace FD_ISA {
namespace {

constexpr int64_t kSkew = 16;  // elements between rows and matrices, or they share a cache's set

constexpr int64_t kBlock = 1 << 17;  // elements of a block

typedef uint8_t Bytes __attribute__((vector_size(kLanes), aligned(1), may_alias));

IntVec load_bytes(const uint8_t* p, int n) {
  if (n == kLanes) return __builtin_convertvector(*reinterpret_cast<const Bytes*>(p), IntVec);
  IntVec x{};
  for (int i = 0; i < n; ++i) x[i] = p[i];
  return x;
}
void store_bytes(uint8_t* p, IntVec x, int n) {
  if (n == kLanes) *reinterpret_cast<Bytes*>(p) = __builtin_convertvector(x, Bytes);
  else for (int i = 0; i < n; ++i) p[i] = static_cast<uint8_t>(x[i]);
}

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

// Where the pixels y + i step, x + j step of an image are, or `outside`.
template <int count, typename scalar>
void locate(
    const Map<scalar>& map, int64_t image, int64_t y, int64_t x, int64_t step, scalar* outside,
    scalar* (&at)[count][count]) {
  for (int i = 0; i < count; ++i)
    for (int j = 0; j < count; ++j) {
      const int64_t row = y + i * step, column = x + j * step;
      const bool inside = row >= 0 && row < map.H && column >= 0 && column < map.W;
      at[i][j] = inside ? map.data + ((image * map.H + row) * map.W + column) * map.C : outside;
    }
}

// Images to be filtered, or whose gradient is: as they are, or what a pooling left of them.
struct Source {
  Map<const float> map;
  const uint8_t* index;  // of the pooling, or null
  const float* zeros;    // as many as channels
};

// Calls body(c, in) for vectors of channels of the count x count pixels from y, x on, `step` apart.
template <int count, typename Body>
void read_pixels(
    const Source& from, int64_t image, int64_t y, int64_t x, int64_t step, const Body& body) {
  const float* at[count][count];
  locate<count>(from.map, image, y, x, step, from.zeros, at);
  by_vectors(from.map.C, [&](int64_t c, int n) {
    Vec in[count * count];
#pragma GCC unroll 36
    for (int i = 0; i < count * count; ++i) in[i] = load_some(at[i / count][i % count] + c, n);
    body(c, in);
  });
}

// The same where a pooling left every second pixel, y and x even.
template <int count, typename Body>
void read_pooled(const Source& from, int64_t image, int64_t y, int64_t x, const Body& body) {
  constexpr int windows = count / 2;
  const float* at[windows][windows];
  locate<windows>(from.map, image, y / 2, x / 2, 1, from.zeros, at);
  by_vectors(from.map.C, [&](int64_t c, int n) {
    Vec in[count * count];
#pragma GCC unroll 9
    for (int i = 0; i < windows * windows; ++i) {
      const float* p = at[i / windows][i % windows];
      const uint8_t* index = p == from.zeros ? from.index : from.index + (p - from.map.data);
      const IntVec which = load_bytes(index + c, n);
      const Vec v = load_some(p + c, n);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k)
        in[(2 * (i / windows) + k / 2) * count + 2 * (i % windows) + k % 2] =
            which == IntVec{} + k ? v : Vec{};
    }
    body(c, in);
  });
}

// A tile's pixels from y, x on times L on both sides, to `to`: channels side by side, filled up with
// zeros; its elements `plane` apart.
template <const auto& L, int rows, int columns>
void transform(
    const Source& from, int64_t image, int64_t y, int64_t x, int64_t step, float* to,
    int64_t plane) {
  const auto body = [&](int64_t c, const Vec* in) {
    Vec out[rows * rows];
    multiply_both<L, rows, columns>(in, out);
    for (int i = 0; i < rows * rows; ++i) store(to + i * plane + c, out[i]);
  };
  bool pooled = false;
  if constexpr (columns % 2 == 0) pooled = from.index != nullptr;
  if constexpr (columns % 2 == 0)
    if (pooled) read_pooled<columns>(from, image, y, x, body);
  if (!pooled) read_pixels<columns>(from, image, y, x, step, body);
  for (int64_t c = (from.map.C + kLanes - 1) / kLanes * kLanes; c % 16; c += kLanes)
    for (int i = 0; i < rows * rows; ++i) store(to + i * plane + c, Vec{});
}

// The tile's samples of all inputs of a group, one after the other.
template <typename F>
void transform_samples(
    const Winograd& w, int64_t group, const Source& from, const Corner& at, float* to,
    int64_t plane) {
  const int64_t step = w.window.stride, y = step * at.y - w.window.border,
                x = step * at.x - w.window.border;
  for (int64_t p = group; p < group + w.ins; ++p, to += w.padded_C)
    transform<F::kSamples, F::T, F::T>(from, at.image, y + p / 2, x + p % 2, step, to, plane);
}

// Outputs of all parities of a group from the tile's products.
template <typename F>
void transform_outputs(
    const Winograd& w, int64_t group, const float* from, int64_t plane, const float* bias, const Corner& at,
    const Map<float>& y, float* outside) {
  const int64_t step = w.window.splits ? 2 : 1;
  for (int64_t p = group; p < group + w.outs; ++p, from += w.padded_O) {
    float* to[F::m][F::m];
    locate<F::m>(y, at.image, step * at.y + p / 2, step * at.x + p % 2, step, outside, to);
    by_vectors(w.O, [&](int64_t o, int n) {
      Vec in[F::T * F::T], out[F::m * F::m];
      for (int i = 0; i < F::T * F::T; ++i) in[i] = load(from + i * plane + o);
      multiply_both<F::kOutputs, F::m, F::T>(in, out);
      const Vec b = bias ? load_some(bias + o, n) : Vec{};
      for (int i = 0; i < F::m * F::m; ++i) store_some(to[i / F::m][i % F::m] + o, out[i] + b, n);
    });
  }
}

// The largest output of a tile of 2x2, the first of equals or a NaN, and its number.
template <typename F>
void transform_pooled(
    const Winograd& w, const float* from, int64_t plane, const float* bias, int64_t tile, float* y,
    uint8_t* index) {
  by_vectors(w.O, [&](int64_t o, int n) {
    Vec in[F::T * F::T], out[F::m * F::m];
    for (int i = 0; i < F::T * F::T; ++i) in[i] = load(from + i * plane + o);
    multiply_both<F::kOutputs, F::m, F::T>(in, out);
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

class Zeros {
 public:
  explicit Zeros(int64_t count) : data_(count) {
    for (int64_t i = 0; i < count; ++i) data_.get()[i] = 0.0f;
  }
  const float* get() const { return data_.get(); }

 private:
  Buffer data_;
};

// Tiles of a block: as much memory as the right matrices, which each block reads, but no less than
// the second cache keeps.
int64_t block_tiles(const Winograd& w) {
  const int64_t tile = w.T * w.T * (w.depth + w.width);
  const int64_t count = (w.weights > kBlock ? w.weights : kBlock) / tile / kTile * kTile;
  return count > kTile ? count : kTile;
}

template <typename F>
void filter(
    const Winograd& w, const Source& x, const float* weight, const float* bias, float* y,
    uint8_t* index, int64_t begin, int64_t end) {
  constexpr int TT = F::T * F::T;
  const int64_t block = block_tiles(w), left = w.depth + kSkew, right = w.width + kSkew;
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
            transform_pooled<F>(w, from, right_plane, bias, first + i, y, index);
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
    const Winograd& w, const Source& x, const Source& dy, int64_t begin, int64_t end, float* sums) {
  constexpr int TT = F::T * F::T;
  const int64_t block = block_tiles(w);
  const int64_t left = w.depth + kSkew, right = w.width + kSkew;
  const int64_t left_plane = block * left + kSkew, right_plane = block * right + kSkew;
  const Buffer samples(TT * left_plane), outputs(TT * right_plane);
  for (int64_t first = begin; first < end; first += block) {
    const int64_t count = end - first < block ? end - first : block;
    for (int64_t i = 0; i < count; ++i) {
      const Corner at = corner_of(w, first + i);
      transform_samples<F>(w, 0, x, at, samples.get() + i * left, left_plane);
      transform<F::kOutputsBack, F::T, F::m>(
          dy, at.image, at.y, at.x, 1, outputs.get() + i * right, right_plane);
    }
    for (int64_t t = 0; t < TT; ++t)
      product<true>(
          w.depth, w.width, count, samples.get() + t * left_plane, left,
          outputs.get() + t * right_plane, right, sums + t * w.depth * w.width, w.width,
          first > begin);
  }
}

// Matrices of the channels begin .. end - 1, and the panels that `product` reads.
template <typename F>
void pack(const Winograd& w, const float* weight, int64_t begin, int64_t end, float* packed) {
  constexpr int R = F::R, TT = F::T * F::T;
  const int64_t K = w.window.K, stride = w.window.stride;
  const int64_t size = w.depth * w.width;
  for (int64_t g = 0; g < w.groups; ++g)
    for (int64_t k = 0; k < w.depth; ++k) {
      const int64_t phase = k / w.padded_C, c = k % w.padded_C;
      if (c < begin || c >= end) continue;
      for (int64_t n = 0, vectors; n < w.width; n += vectors * kLanes) {
        vectors = panel_vectors((w.width - n) / kLanes);
        for (int64_t v = 0; v < vectors; ++v) {
          const int64_t column = n + v * kLanes, o = column % w.padded_O;
          const int64_t out = w.groups > 1 ? g : column / w.padded_O;
          const int64_t left = c < w.C ? w.O - o : 0;
          const int some = static_cast<int>(left < 0 ? 0 : left < kLanes ? left : kLanes);
          Vec taps[R * R], products[TT];
          for (int i = 0; i < R * R; ++i) {
            const int64_t row = i / R * stride + phase / 2, tap = i % R * stride + phase % 2;
            taps[i] = load_some(weight + (((out * K + row) * K + tap) * w.C + c) * w.O + o, some);
          }
          multiply_both<F::kWeights, F::T, R>(taps, products);
          float* to = packed + g * w.weights + n * w.depth + (k * vectors + v) * kLanes;
          for (int t = 0; t < TT; ++t) store(to + t * size, products[t]);
        }
      }
    }
}

// The weights' gradient (K, K, C, O) of the channels begin .. end - 1 from the parts' sums.
template <typename F>
void unpack(
    const Winograd& w, const float* sums, int64_t parts, int64_t begin, int64_t end,
    float* dweight) {
  constexpr int R = F::R, TT = F::T * F::T;
  const int64_t K = w.window.K, stride = w.window.stride;
  for (int64_t phase = 0; phase < w.ins; ++phase)
    for (int64_t c = begin; c < end; ++c)
      by_vectors(w.O, [&](int64_t o, int n) {
        const float* from = sums + (phase * w.padded_C + c) * w.width + o;
        Vec products[TT], taps[R * R];
        for (int t = 0; t < TT; ++t) {
          products[t] = load(from + t * w.depth * w.width);
          for (int64_t p = 1; p < parts; ++p)
            products[t] += load(from + p * w.weights + t * w.depth * w.width);
        }
        multiply_both<F::kWeightsBack, R, F::T>(products, taps);
        for (int i = 0; i < R * R; ++i) {
          const int64_t row = i / R * stride + phase / 2;
          const int64_t tap = i % R * stride + phase % 2;
          store_some(dweight + ((row * K + tap) * w.C + c) * w.O + o, taps[i], n);
        }
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
  const Zeros zeros(w.C);
  const Source from{{x, pooled ? w.H / 2 : w.H, pooled ? w.W / 2 : w.W, w.C}, pooled, zeros.get()};
  with_filtering(w, [&](auto f) {
    filter<decltype(f)>(w, from, packed, bias, y, index, begin, end);
  });
}

// Sums over the tiles begin .. end - 1, from x and the gradient of its window's outputs, or what a
// pooling left of it.
void winograd_gradient(
    const Winograd& w, const float* x, const float* dy, const uint8_t* pooled, int64_t begin,
    int64_t end, float* sums) {
  const Zeros zeros(w.C > w.O ? w.C : w.O);
  const int64_t step = pooled ? 2 : w.window.stride;
  const Source from{{x, w.H, w.W, w.C}, nullptr, zeros.get()};
  const Source to{{dy, w.H / step, w.W / step, w.O}, pooled, zeros.get()};
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
