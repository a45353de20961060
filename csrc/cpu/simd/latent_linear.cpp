// A linear layer on features whose latents are one-hot: their product is a sum of rows.
#include <stdint.h>

#include "vec.h"

namespace fastdreamer {
namespace FD_ISA {
namespace {

// Sums at most kHeld vectors of a row in registers.
constexpr int kHeld = 8;

template <int held>
inline void sum_rows(
    const float* table, const int32_t* index, int64_t S, int64_t K, int64_t O, float* y) {
  Vec total[held];
  for (int v = 0; v < held; ++v) total[v] = load(y + v * kLanes);
  for (int64_t s = 0; s < S; ++s) {
    if (index[s] < 0) continue;
    const float* row = table + (s * K + index[s]) * O;
    for (int v = 0; v < held; ++v) total[v] += load(row + v * kLanes);
  }
  for (int v = 0; v < held; ++v) store(y + v * kLanes, total[v]);
}

inline void sum_some(
    const float* table, const int32_t* index, int64_t S, int64_t K, int64_t O, float* y, int n) {
  Vec total = load_some(y, n);
  for (int64_t s = 0; s < S; ++s)
    if (index[s] >= 0) total += load_some(table + (s * K + index[s]) * O, n);
  store_some(y, total, n);
}

}  // namespace

// y (O) of rows begin .. end - 1 += the table's rows (S K, O) of each latent's class.
void latent_gather_rows(
    const float* table, const int32_t* index, float* y, int64_t begin, int64_t end, int64_t S,
    int64_t K, int64_t O) {
  for (int64_t n = begin; n < end; ++n) {
    const int32_t* classes = index + n * S;
    float* row = y + n * O;
    int64_t o = 0;
    for (; o + kHeld * kLanes <= O; o += kHeld * kLanes)
      sum_rows<kHeld>(table + o, classes, S, K, O, row + o);
    for (; o + kLanes <= O; o += kLanes) sum_rows<1>(table + o, classes, S, K, O, row + o);
    if (o < O) sum_some(table + o, classes, S, K, O, row + o, static_cast<int>(O - o));
  }
}

// The table's gradient for latents first .. last - 1: each row of dy (N, O) is added to the row of
// its class, in the order of the rows. dtable (S K, O) starts at 0.
void latent_scatter_rows(
    const float* dy, const int32_t* index, float* dtable, int64_t N, int64_t first, int64_t last,
    int64_t S, int64_t K, int64_t O) {
  constexpr int64_t kBlock = 128;  // rows of dy that stay in the cache while all latents read them
  for (int64_t start = 0; start < N; start += kBlock) {
    const int64_t stop = start + kBlock < N ? start + kBlock : N;
    for (int64_t s = first; s < last; ++s)
      for (int64_t n = start; n < stop; ++n) {
        const int32_t drawn = index[n * S + s];
        if (drawn < 0) continue;
        float* row = dtable + (s * K + drawn) * O;
        by_vectors(O, [&](int64_t o, int c) {
          store_some(row + o, load_some(row + o, c) + load_some(dy + n * O + o, c), c);
        });
      }
  }
}

}  // namespace FD_ISA
}  // namespace fastdreamer
