// Categoricals of K classes, kLanes rows at a time. p = exp(logp) throughout.
#include "unimix.h"

#include "tile.h"

namespace fastdreamer {
namespace FD_ISA {

// exp where it matters that e^x underflows to 0.
static inline Vec probability(Vec logp) { return logp < -87.33654f ? Vec{} : exp(logp); }

// Calls body(first row, number of rows) over begin .. end - 1, kLanes rows at a time.
template <typename Body>
static inline void by_rows(int64_t begin, int64_t end, const Body& body) {
  by_vectors(end - begin, [&](int64_t i, int rows) { body(begin + i, rows); });
}

// logp = ln(floor + (1 - mix) softmax(x)), floor = mix / K, of the tile's rows
static inline void unimix_tile(Tile& tile, int64_t K, float mix) {
  const float floor = mix / static_cast<float>(K);
  Vec best = tile.get(0), total{};
  for (int64_t k = 1; k < K; ++k) best = max(best, tile.get(k));
  for (int64_t k = 0; k < K; ++k) {
    const Vec e = exp(tile.get(k) - best);
    total += e;
    if (mix != 0) tile.set(k, e);
  }
  const Vec scale = (1.0f - mix) / total, log_total = best + log(total);
  for (int64_t k = 0; k < K; ++k) {
    const Vec v = tile.get(k);
    tile.set(k, mix != 0 ? log(v * scale + floor) : v - log_total);
  }
}

// The first of the largest left + right of each row; a NaN is larger than any number, as in PyTorch.
static inline IntVec first_largest(const Tile& left, const Tile& right, int64_t K) {
  Vec best = left.get(0) + right.get(0);
  IntVec index{};
  for (int64_t k = 1; k < K; ++k) {
    const Vec v = left.get(k) + right.get(k);
    const IntVec better = ((v > best) | (v != v)) & (best == best);
    best = better ? v : best;
    index = better ? IntVec{} + static_cast<int32_t>(k) : index;
  }
  return index;
}

void unimix_rows(
    const float* x, float* logp, int64_t begin, int64_t end, int64_t K, float mix) {
  Tile tile(K);
  by_rows(begin, end, [&](int64_t row, int rows) {
    tile.read(x + row * K, rows);
    unimix_tile(tile, K, mix);
    tile.write(logp + row * K, rows);
  });
}

void draw_latents(
    int64_t M, int64_t S, int64_t K, float mix, Rows<const float> x, Rows<const float> noise,
    Rows<float> logp, Rows<int32_t> index) {
  Tile tile(K), added(K);
  for (int64_t m = 0; m < M; ++m)
    by_rows(0, S, [&](int64_t s, int rows) {
      tile.read(x[m] + s * K, rows);
      unimix_tile(tile, K, mix);
      if (logp.data) tile.write(logp[m] + s * K, rows);
      added.read(noise[m] + s * K, rows);
      const IntVec drawn = first_largest(tile, added, K);
      if (rows == kLanes) store_bits(index[m] + s, drawn);
      else for (int i = 0; i < rows; ++i) index[m][s + i] = drawn[i];
    });
}

// share = p - floor = (1 - mix) softmax;  dx = share (dlogp / p - sum(share dlogp / p) / (1 - mix))
void unimix_rows_backward(
    const float* dlogp, const float* logp, float* dx, int64_t begin, int64_t end, int64_t K,
    float mix) {
  Tile tile(K), share(K);
  const float floor = mix / static_cast<float>(K), unit = mix < 1 ? 1 / (1 - mix) : 0;
  by_rows(begin, end, [&](int64_t row, int rows) {
    share.read(logp + row * K, rows);
    tile.read(dlogp + row * K, rows);
    Vec along{};
    for (int64_t k = 0; k < K; ++k) {
      const Vec logpk = share.get(k), p = probability(logpk), part = p - floor;
      const Vec d = mix != 0 ? tile.get(k) * (part / p) : tile.get(k);
      along += d;
      share.set(k, part);
      tile.set(k, d);
    }
    along *= unit;
    for (int64_t k = 0; k < K; ++k) tile.set(k, tile.get(k) - share.get(k) * along);
    tile.write(dx + row * K, rows);
  });
}

// -sum(p logp)
void entropy_rows(const float* logp, float* y, int64_t begin, int64_t end, int64_t K) {
  Tile tile(K);
  by_rows(begin, end, [&](int64_t row, int rows) {
    tile.read(logp + row * K, rows);
    Vec total{};
    for (int64_t k = 0; k < K; ++k) total += probability(tile.get(k)) * tile.get(k);
    store_some(y + row, -total, rows);
  });
}

// dlogp = -dy p (logp + 1)
void entropy_rows_backward(
    const float* dy, const float* logp, float* dlogp, int64_t begin, int64_t end, int64_t K) {
  Tile tile(K);
  by_rows(begin, end, [&](int64_t row, int rows) {
    tile.read(logp + row * K, rows);
    const Vec d = load_some(dy + row, rows);
    for (int64_t k = 0; k < K; ++k)
      tile.set(k, -d * probability(tile.get(k)) * (tile.get(k) + 1.0f));
    tile.write(dlogp + row * K, rows);
  });
}

// sum(p (logp - logq))
void kl_rows(
    const float* logp, const float* logq, float* y, int64_t begin, int64_t end, int64_t K) {
  Tile left(K), right(K);
  by_rows(begin, end, [&](int64_t row, int rows) {
    left.read(logp + row * K, rows);
    right.read(logq + row * K, rows);
    Vec total{};
    for (int64_t k = 0; k < K; ++k)
      total += probability(left.get(k)) * (left.get(k) - right.get(k));
    store_some(y + row, total, rows);
  });
}

// dlogp = dp p (logp - logq + 1),  dlogq = -dq p
void kl_rows_backward(
    const float* dp, const float* dq, const float* logp, const float* logq, float* dlogp,
    float* dlogq, int64_t begin, int64_t end, int64_t K) {
  Tile left(K), right(K);
  by_rows(begin, end, [&](int64_t row, int rows) {
    left.read(logp + row * K, rows);
    right.read(logq + row * K, rows);
    const Vec to_p = load_some(dp + row, rows), to_q = load_some(dq + row, rows);
    for (int64_t k = 0; k < K; ++k) {
      const Vec p = probability(left.get(k));
      left.set(k, to_p * p * (left.get(k) - right.get(k) + 1.0f));
      right.set(k, -to_q * p);
    }
    left.write(dlogp + row * K, rows);
    right.write(dlogq + row * K, rows);
  });
}

// One-hot of the first largest logp + noise.
void sample_rows(
    const float* logp, const float* noise, float* onehot, int64_t begin, int64_t end, int64_t K) {
  Tile left(K), right(K);
  by_rows(begin, end, [&](int64_t row, int rows) {
    left.read(logp + row * K, rows);
    right.read(noise + row * K, rows);
    const IntVec index = first_largest(left, right, K);
    for (int64_t i = 0; i < rows * K; ++i) onehot[row * K + i] = 0;
    for (int64_t i = 0; i < rows; ++i) onehot[(row + i) * K + index[i]] = 1;
  });
}

// The straight-through gradient: dlogp = donehot p
void sample_rows_backward(
    const float* donehot, const float* logp, float* dlogp, int64_t begin, int64_t end, int64_t K) {
  by_rows(begin * K, end * K, [&](int64_t i, int count) {
    store_some(
        dlogp + i, load_some(donehot + i, count) * probability(load_some(logp + i, count)), count);
  });
}

}  // namespace FD_ISA
}  // namespace fastdreamer
