// Norm and SiLU over rows; see norm.h for the formulas.
#include "norm.h"

namespace fastdreamer {
namespace FD_ISA {

void norm_rows(
    const float* x, const float* scale, const float* shift, float* y, int64_t begin, int64_t end,
    int64_t n, bool centred, float eps, bool silu) {
  const Norm norm{scale, shift, centred, eps};
  for (int64_t i = begin; i < end; ++i) {
    if (silu) norm_row<true>(norm, x + i * n, y + i * n, n);
    else norm_row<false>(norm, x + i * n, y + i * n, n);
  }
}

}  // namespace FD_ISA
}  // namespace fastdreamer
