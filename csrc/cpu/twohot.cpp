// Two-hot cross-entropy and mean over bins; the formulas are in simd/twohot.cpp.
#include "isa.h"
#include "parallel.h"
#include "tensor.h"

namespace fastdreamer {

FD_DECLARE(void twohot_loss_rows(
    const float* logits, const float* y, const float* bins, float* loss, float* stats,
    int64_t M, int64_t rows, int64_t K))
FD_DECLARE(void twohot_loss_backward_rows(
    const float* dloss, const float* logits, const float* y, const float* bins, const float* stats,
    float* dlogits, int64_t M, int64_t rows, int64_t K))
FD_DECLARE(void twohot_mean_rows(
    const float* logits, const float* bins, float* mean, int64_t rows, int64_t K, int64_t stride))

namespace {

constexpr int64_t kGrain = 16384;  // logits that are worth a thread

void loss_rows(
    const float* logits, const float* y, const float* bins, float* loss, float* stats,
    int64_t M, int64_t rows, int64_t K) {
  FD_DISPATCH(twohot_loss_rows(logits, y, bins, loss, stats, M, rows, K))
}

void backward_rows(
    const float* dloss, const float* logits, const float* y, const float* bins, const float* stats,
    float* dlogits, int64_t M, int64_t rows, int64_t K) {
  FD_DISPATCH(twohot_loss_backward_rows(dloss, logits, y, bins, stats, dlogits, M, rows, K))
}

void mean_rows(const float* logits, const float* bins, float* mean, int64_t rows, int64_t K) {
  FD_DISPATCH(twohot_mean_rows(logits, bins, mean, rows, K, K))
}

// Checks, then body(begin, end) over ranges of rows.
template <typename Body>
int32_t over_rows(
    int64_t rows, int64_t K, int32_t dtype, std::initializer_list<const void*> pointers,
    const Body& body) {
  if (rows < 0 || K < 1 || K % 2 == 0) return FD_ERROR_SIZE;
  if (dtype != FD_FLOAT32) return FD_ERROR_DTYPE;
  if (rows == 0) return FD_OK;
  if (any_null(pointers)) return FD_ERROR_NULL_POINTER;
  parallel_ranges(rows, (kGrain + K - 1) / K, body);
  return FD_OK;
}

const float* floats(const void* data) { return static_cast<const float*>(data); }
float* floats(void* data) { return static_cast<float*>(data); }

}  // namespace
}  // namespace fastdreamer

int32_t fd_twohot_loss(
    const void* logits, const void* y, const void* bins, void* loss, void* stats,
    int64_t M, int64_t rows, int64_t K, int32_t dtype, void*) {
  using namespace fastdreamer;
  if (M < 1) return FD_ERROR_SIZE;
  return over_rows(rows, K, dtype, {logits, y, bins, loss, stats}, [&](int64_t begin, int64_t end) {
    loss_rows(
        floats(logits) + begin * K, floats(y) + begin * M, floats(bins), floats(loss) + begin,
        floats(stats) + 2 * begin, M, end - begin, K);
  });
}

int32_t fd_twohot_loss_backward(
    const void* dloss, const void* logits, const void* y, const void* bins, const void* stats,
    void* dlogits, int64_t M, int64_t rows, int64_t K, int32_t dtype, void*) {
  using namespace fastdreamer;
  if (M < 1) return FD_ERROR_SIZE;
  const auto pointers = {dloss, logits, y, bins, stats, static_cast<const void*>(dlogits)};
  return over_rows(rows, K, dtype, pointers, [&](int64_t begin, int64_t end) {
    backward_rows(
        floats(dloss) + begin, floats(logits) + begin * K, floats(y) + begin * M, floats(bins),
        floats(stats) + 2 * begin, floats(dlogits) + begin * K, M, end - begin, K);
  });
}

int32_t fd_twohot_mean(
    const void* logits, const void* bins, void* mean,
    int64_t rows, int64_t K, int32_t dtype, void*) {
  using namespace fastdreamer;
  return over_rows(rows, K, dtype, {logits, bins, mean}, [&](int64_t begin, int64_t end) {
    mean_rows(floats(logits) + begin * K, floats(bins), floats(mean) + begin, end - begin, K);
  });
}
