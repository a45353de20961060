// Two-hot cross-entropy and mean of rows of K logits over K ascending bins.
//   weight = (b[above] - y) / (b[above] - b[below]) on the bin below y, the rest on the one above
//   loss = -sum weight logp,  dlogits = dloss (softmax - weight),  mean = sum p b
#include <math.h>

#include "lanes.h"

namespace fastdreamer {
namespace FD_ISA {
namespace {

// Calls body(first element, lanes not seen before) over 0 .. n - 1 by whole vectors: the last one
// overlaps the one before it, or runs over the end where there is only one.
template <typename Body>
inline void by_whole_vectors(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, IntVec{} == 0);
  if (i == n) return;
  IntVec lane;
  for (int l = 0; l < kLanes; ++l) lane[l] = l;
  if (i == 0) body(0, lane < static_cast<int>(n));
  else body(n - kLanes, lane >= static_cast<int>(i - (n - kLanes)));
}

// A row that whole vectors can read: itself, or a copy that goes on with -inf.
class Row {
 public:
  Row(const float* x, int64_t n) : data_(x) {
    if (n >= kLanes) return;
    store(copy_, load_part(x, n, -INFINITY));
    data_ = copy_;
  }
  Row(const Row&) = delete;
  const float* get() const { return data_; }

 private:
  float copy_[kLanes];
  const float* data_;
};

struct Stats {
  float max, sum;  // of the logits; of e^(logit - max)
};

float highest(const float* x, int64_t K) {
  Vec top = broadcast(-INFINITY);
  by_whole_vectors(K, [&](int64_t i, IntVec) { top = max(top, load(x + i)); });
  return max(top);
}

Stats softmax_stats(const float* x, int64_t K) {
  const float top = highest(x, K);
  Vec total{};
  by_whole_vectors(K, [&](int64_t i, IntVec fresh) {
    total += fresh ? exp(load(x + i) - top) : Vec{};
  });
  return {top, sum(total)};
}

struct Place {
  int64_t below, above;
  float weight;  // of the bin below; NaN where y is
};

Place find(const float* bins, int64_t K, float y) {
  int64_t count = 0;  // bins <= y
  for (int64_t n = K; n > 0;) {
    const int64_t half = n / 2;
    const bool right = bins[count + half] <= y;
    count = right ? count + half + 1 : count;
    n = right ? n - half - 1 : half;
  }
  if (count == 0) return {0, 0, y == y ? 1.0f : y};
  if (count == K) return {K - 1, K - 1, 1.0f};
  const float to_below = y - bins[count - 1], to_above = bins[count] - y;
  return {count - 1, count, to_above / (to_below + to_above)};
}

void loss_row(
    const float* x, const float* y, const float* bins, float* loss, float* stats, int64_t M,
    int64_t K) {
  const Row row(x, K);
  const Stats s = softmax_stats(row.get(), K);
  const float log_sum = log(broadcast(s.sum))[0];
  *loss = 0;
  for (int64_t m = 0; m < M; ++m) {
    const Place place = find(bins, K, y[m]);
    const float below = x[place.below] - s.max - log_sum;
    const float above = x[place.above] - s.max - log_sum;
    *loss -= place.weight * below + (1 - place.weight) * above;
  }
  stats[0] = s.max;
  stats[1] = s.sum;
}

void backward_row(
    float dloss, const float* x, const float* y, const float* bins, const float* stats, float* dx,
    int64_t M, int64_t K) {
  const Row row(x, K);
  float narrow[kLanes];
  float* out = K < kLanes ? narrow : dx;
  float total = 0;  // of the weights: M, or NaN where a target is
  for (int64_t m = 0; m < M; ++m) {
    const float weight = find(bins, K, y[m]).weight;
    total += weight + (1 - weight);
  }
  const float factor = dloss * total / stats[1];
  by_whole_vectors(K, [&](int64_t i, IntVec) {
    store(out + i, exp(load(row.get() + i) - stats[0]) * factor);
  });
  if (out != dx) store_part(dx, load(narrow), K);
  for (int64_t m = 0; m < M; ++m) {
    const Place place = find(bins, K, y[m]);
    dx[place.below] -= dloss * place.weight;
    dx[place.above] -= dloss * (1 - place.weight);
  }
}

template <int... lane>
inline Vec reversed(Vec x, Lanes<lane...>) {
  return shuffle(x, x, Lanes<(kLanes - 1 - lane)...>());
}

// Over pairs of symmetric bins, so that equal logits give exactly 0.
float mean_row(const float* x, const float* bins, int64_t K) {
  const int64_t half = K / 2;
  const float *upper = x + half + 1, *positions = bins + half + 1;
  if (half < kLanes) {
    const Row row(x, K);
    const Stats s = softmax_stats(row.get(), K);
    Vec high = load_part(upper, half), low = high;
    for (int64_t l = 0; l < half; ++l) low[l] = x[half - 1 - l];
    return sum((exp(high - s.max) - exp(low - s.max)) * load_part(positions, half)) / s.sum;
  }
  const float top = highest(x, K);
  Vec weighted{}, total{};
  by_whole_vectors(half, [&](int64_t i, IntVec fresh) {
    const Vec low = exp(reversed(load(x + half - i - kLanes), AllLanes()) - top);
    const Vec high = exp(load(upper + i) - top);
    weighted += fresh ? (high - low) * load(positions + i) : Vec{};
    total += fresh ? high + low : Vec{};
  });
  return sum(weighted) / (sum(total) + exp(broadcast(x[half] - top))[0]);
}

}  // namespace

void twohot_loss_rows(
    const float* logits, const float* y, const float* bins, float* loss, float* stats,
    int64_t M, int64_t rows, int64_t K) {
  for (int64_t i = 0; i < rows; ++i)
    loss_row(logits + i * K, y + i * M, bins, loss + i, stats + 2 * i, M, K);
}

void twohot_loss_backward_rows(
    const float* dloss, const float* logits, const float* y, const float* bins, const float* stats,
    float* dlogits, int64_t M, int64_t rows, int64_t K) {
  for (int64_t i = 0; i < rows; ++i)
    backward_row(
        dloss[i], logits + i * K, y + i * M, bins, stats + 2 * i, dlogits + i * K, M, K);
}

// Rows that lie `stride` elements apart.
void twohot_mean_rows(
    const float* logits, const float* bins, float* mean, int64_t rows, int64_t K, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i) mean[i] = mean_row(logits + i * stride, bins, K);
}

}  // namespace FD_ISA
}  // namespace fastdreamer
