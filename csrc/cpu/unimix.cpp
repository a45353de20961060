// Checks, then rows on several threads; the formulas are in simd/unimix.cpp.
#include "isa.h"
#include "parallel.h"
#include "tensor.h"

namespace fastdreamer {

FD_DECLARE(void unimix_rows(const float*, float*, int64_t, int64_t, int64_t, float))
FD_DECLARE(void unimix_rows_backward(
    const float*, const float*, float*, int64_t, int64_t, int64_t, float))
FD_DECLARE(void entropy_rows(const float*, float*, int64_t, int64_t, int64_t))
FD_DECLARE(void entropy_rows_backward(
    const float*, const float*, float*, int64_t, int64_t, int64_t))
FD_DECLARE(void kl_rows(const float*, const float*, float*, int64_t, int64_t, int64_t))
FD_DECLARE(void kl_rows_backward(
    const float*, const float*, const float*, const float*, float*, float*, int64_t, int64_t,
    int64_t))
FD_DECLARE(void sample_rows(const float*, const float*, float*, int64_t, int64_t, int64_t))
FD_DECLARE(void sample_rows_backward(
    const float*, const float*, float*, int64_t, int64_t, int64_t))

}  // namespace fastdreamer

using namespace fastdreamer;

int32_t fd_unimix(
    const float* logits, float* logp, int64_t N, int64_t K, float mix, int32_t dtype, void*) {
  if (!(mix >= 0 && mix <= 1)) return FD_ERROR_SIZE;
  return by_row_ranges({logits, logp}, N, K, dtype, [&](int64_t begin, int64_t end) {
    FD_DISPATCH(unimix_rows(logits, logp, begin, end, K, mix))
  });
}

int32_t fd_unimix_backward(
    const float* dlogp, const float* logp, float* dlogits, int64_t N, int64_t K, float mix,
    int32_t dtype, void*) {
  if (!(mix >= 0 && mix <= 1)) return FD_ERROR_SIZE;
  return by_row_ranges({dlogp, logp, dlogits}, N, K, dtype, [&](int64_t begin, int64_t end) {
    FD_DISPATCH(unimix_rows_backward(dlogp, logp, dlogits, begin, end, K, mix))
  });
}

int32_t fd_entropy(
    const float* logp, float* entropy, int64_t N, int64_t K, int32_t dtype, void*) {
  return by_row_ranges({logp, entropy}, N, K, dtype, [&](int64_t begin, int64_t end) {
    FD_DISPATCH(entropy_rows(logp, entropy, begin, end, K))
  });
}

int32_t fd_entropy_backward(
    const float* dentropy, const float* logp, float* dlogp, int64_t N, int64_t K, int32_t dtype,
    void*) {
  return by_row_ranges({dentropy, logp, dlogp}, N, K, dtype, [&](int64_t begin, int64_t end) {
    FD_DISPATCH(entropy_rows_backward(dentropy, logp, dlogp, begin, end, K))
  });
}

int32_t fd_kl(
    const float* logp, const float* logq, float* kl, int64_t N, int64_t K, int32_t dtype, void*) {
  return by_row_ranges({logp, logq, kl}, N, K, dtype, [&](int64_t begin, int64_t end) {
    FD_DISPATCH(kl_rows(logp, logq, kl, begin, end, K))
  });
}

int32_t fd_kl_backward(
    const float* dp, const float* dq, const float* logp, const float* logq, float* dlogp,
    float* dlogq, int64_t N, int64_t K, int32_t dtype, void*) {
  return by_row_ranges(
      {dp, dq, logp, logq, dlogp, dlogq}, N, K, dtype, [&](int64_t begin, int64_t end) {
        FD_DISPATCH(kl_rows_backward(dp, dq, logp, logq, dlogp, dlogq, begin, end, K))
      });
}

int32_t fd_sample(
    const float* logp, const float* noise, float* onehot, int64_t N, int64_t K, int32_t dtype,
    void*) {
  return by_row_ranges({logp, noise, onehot}, N, K, dtype, [&](int64_t begin, int64_t end) {
    FD_DISPATCH(sample_rows(logp, noise, onehot, begin, end, K))
  });
}

int32_t fd_sample_backward(
    const float* donehot, const float* logp, float* dlogp, int64_t N, int64_t K, int32_t dtype,
    void*) {
  return by_row_ranges({donehot, logp, dlogp}, N, K, dtype, [&](int64_t begin, int64_t end) {
    FD_DISPATCH(sample_rows_backward(donehot, logp, dlogp, begin, end, K))
  });
}
