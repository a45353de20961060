// Unimixed categoricals, for the scans that draw them on the way. Rows begin .. end - 1 of K
// contiguous classes; the output may be the first input.
#ifndef FASTDREAMER_CPU_SIMD_UNIMIX_H
#define FASTDREAMER_CPU_SIMD_UNIMIX_H

#include <stdint.h>

namespace fastdreamer {
namespace FD_ISA {

void unimix_rows(
    const float* x, float* logp, int64_t begin, int64_t end, int64_t K, float mix);
void unimix_rows_backward(
    const float* dlogp, const float* logp, float* dx, int64_t begin, int64_t end, int64_t K,
    float mix);

}  // namespace FD_ISA
}  // namespace fastdreamer

#endif
