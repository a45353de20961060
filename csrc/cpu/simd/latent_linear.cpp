// A linear layer on features whose latents are one-hot: their product is a sum of rows.
#include "gather.h"

namespace fastdreamer {
namespace FD_ISA {

// y (O) of rows begin .. end - 1 += the table's rows (S K, O) of each latent's class.
void latent_gather_rows(
    const float* table, const int32_t* index, float* y, int64_t begin, int64_t end, int64_t S,
    int64_t K, int64_t O) {
  for (int64_t n = begin; n < end; ++n) gather_row(table, index + n * S, S, K, O, y + n * O);
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
