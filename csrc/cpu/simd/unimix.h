// Unimixed categoricals, for the scans that draw them on the way. Rows begin .. end - 1 of K
// contiguous classes; the output may be the first input.
#ifndef FASTDREAMER_CPU_SIMD_UNIMIX_H
#define FASTDREAMER_CPU_SIMD_UNIMIX_H

#include "rows.h"

namespace fastdreamer {
namespace FD_ISA {

void unimix_rows(
    const float* x, float* logp, int64_t begin, int64_t end, int64_t K, float mix);
// The same for the S latents of each of M rows, where `logp` has data; index (M, S) becomes the
// first class of the greatest logp + noise, a NaN the greatest of all.
void draw_latents(
    int64_t M, int64_t S, int64_t K, float mix, Rows<const float> x, Rows<const float> noise,
    Rows<float> logp, Rows<int32_t> index);
void unimix_rows_backward(
    const float* dlogp, const float* logp, float* dx, int64_t begin, int64_t end, int64_t K,
    float mix);

}  // namespace FD_ISA
}  // namespace fastdreamer

#endif
