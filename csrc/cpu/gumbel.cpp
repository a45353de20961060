// Gumbel noise by counters: every task fills its own numbers, whatever the number of threads.
#include "isa.h"
#include "parallel.h"
#include "tensor.h"

namespace fastdreamer {

FD_DECLARE(void gumbel_blocks(uint64_t key, int64_t block, float* y, int64_t n))

namespace {

constexpr int64_t kBlock = 64;          // numbers that 16 counters give
constexpr int64_t kTask = 16 * kBlock;  // numbers that stay in a core's first cache

void fill_task(uint64_t key, int64_t begin, float* y, int64_t n) {
  FD_DISPATCH(gumbel_blocks(key, begin / kBlock, y + begin, n))
}

}  // namespace
}  // namespace fastdreamer

int32_t fd_gumbel(int64_t seed, float* y, int64_t N, int32_t dtype, void*) {
  using namespace fastdreamer;
  if (N < 0) return FD_ERROR_SIZE;
  if (dtype != FD_FLOAT32) return FD_ERROR_DTYPE;
  if (N == 0) return FD_OK;
  if (!y) return FD_ERROR_NULL_POINTER;
  parallel_for((N + kTask - 1) / kTask, [&](int64_t task) {
    const int64_t begin = task * kTask, left = N - begin;
    fill_task(static_cast<uint64_t>(seed), begin, y, left < kTask ? left : kTask);
  });
  return FD_OK;
}
