// The one-hot share of a linear layer at the C boundary; see simd/latent_linear.cpp.
#include "isa.h"
#include "parallel.h"
#include "tensor.h"

namespace fastdreamer {

FD_DECLARE(void latent_gather_rows(
    const float* table, const int32_t* index, float* y, int64_t begin, int64_t end, int64_t S,
    int64_t K, int64_t O))
FD_DECLARE(void latent_scatter_rows(
    const float* dy, const int32_t* index, float* dtable, int64_t N, int64_t first, int64_t last,
    int64_t S, int64_t K, int64_t O))

namespace {

void gather(
    const float* table, const int32_t* index, float* y, int64_t begin, int64_t end, int64_t S,
    int64_t K, int64_t O) {
  FD_DISPATCH(latent_gather_rows(table, index, y, begin, end, S, K, O))
}
void scatter(
    const float* dy, const int32_t* index, float* dtable, int64_t N, int64_t first, int64_t last,
    int64_t S, int64_t K, int64_t O) {
  FD_DISPATCH(latent_scatter_rows(dy, index, dtable, N, first, last, S, K, O))
}

int32_t check(
    int64_t N, int64_t S, int64_t K, int64_t O, int32_t dtype, const int32_t* index,
    std::initializer_list<const void*> pointers) {
  if (N < 0 || S < 1 || K < 1 || O < 1) return FD_ERROR_SIZE;
  if (dtype != FD_FLOAT32) return FD_ERROR_DTYPE;
  if (N == 0) return FD_OK;
  if (!index || any_null(pointers)) return FD_ERROR_NULL_POINTER;
  for (int64_t i = 0; i < N * S; ++i)
    if (index[i] < -1 || index[i] >= K) return FD_ERROR_SIZE;
  return FD_OK;
}

}  // namespace
}  // namespace fastdreamer

int32_t fd_latent_gather(
    const float* table, const int32_t* index, float* y, int64_t N, int64_t S, int64_t K, int64_t O,
    int32_t dtype, void*) {
  using namespace fastdreamer;
  if (int32_t error = check(N, S, K, O, dtype, index, {table, y})) return error;
  parallel_ranges(N, 64, [&](int64_t begin, int64_t end) {
    gather(table, index, y, begin, end, S, K, O);
  });
  return FD_OK;
}

int32_t fd_latent_scatter(
    const float* dy, const int32_t* index, float* dtable, int64_t N, int64_t S, int64_t K,
    int64_t O, int32_t dtype, void*) {
  using namespace fastdreamer;
  if (int32_t error = check(N, S, K, O, dtype, index, {dy, dtable})) return error;
  parallel_ranges(S, 1, [&](int64_t first, int64_t last) {
    scatter(dy, index, dtable, N, first, last, S, K, O);
  });
  return FD_OK;
}
