// Squared error of predicted images: e = p - (target / 255 - shift), p = x or sigmoid(x).
//   loss = sum e^2,  dx = 2 dloss e p',  p' = 1 or p (1 - p)
#include "vec.h"

namespace fastdreamer {
namespace FD_ISA {
namespace {

inline Vec load_image(const uint8_t* p, int n, float shift) {
  return __builtin_convertvector(load_bytes(p, n), Vec) / 255.0f - shift;
}

template <bool squash>
inline Vec load_prediction(const float* x, int n) {
  return squash ? sigmoid(load_some(x, n)) : load_some(x, n);
}

template <bool squash>
float loss_of(const float* x, const uint8_t* target, int64_t K, float shift) {
  Vec total{};
  by_vectors(K, [&](int64_t i, int n) {
    const Vec e = load_prediction<squash>(x + i, n) - load_image(target + i, n, shift);
    for (int lane = 0; n < kLanes && lane < n; ++lane) total[lane] += e[lane] * e[lane];
    if (n == kLanes) total += e * e;
  });
  return sum(total);
}

template <bool squash>
void gradient_of(
    float dloss, const float* x, const uint8_t* target, float* dx, int64_t K, float shift) {
  by_vectors(K, [&](int64_t i, int n) {
    const Vec p = load_prediction<squash>(x + i, n);
    const Vec dp = 2.0f * dloss * (p - load_image(target + i, n, shift));
    store_some(dx + i, squash ? dp * p * (1.0f - p) : dp, n);
  });
}

}  // namespace

void image_loss_rows(
    const float* x, const uint8_t* target, float* loss, int64_t begin, int64_t end, int64_t K,
    float shift, bool squash) {
  const auto row = squash ? loss_of<true> : loss_of<false>;
  for (int64_t m = begin; m < end; ++m) loss[m] = row(x + m * K, target + m * K, K, shift);
}

void image_loss_rows_backward(
    const float* dloss, const float* x, const uint8_t* target, float* dx, int64_t begin,
    int64_t end, int64_t K, float shift, bool squash) {
  const auto row = squash ? gradient_of<true> : gradient_of<false>;
  for (int64_t m = begin; m < end; ++m)
    row(dloss[m], x + m * K, target + m * K, dx + m * K, K, shift);
}

}  // namespace FD_ISA
}  // namespace fastdreamer
