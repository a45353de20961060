// Convolution and pooling by minimal filtering at the C boundary; the work is in simd/.
#include <algorithm>
#include <memory>

#include "check.h"
#include "isa.h"
#include "parallel.h"
#include "winograd.h"

namespace fastdreamer {

FD_DECLARE(void winograd_pack(const Winograd&, const float*, int64_t, int64_t, float*))
FD_DECLARE(void winograd(
    const Winograd&, const float*, const uint8_t*, const float*, const float*, float*, uint8_t*,
    int64_t, int64_t))
FD_DECLARE(void winograd_gradient(
    const Winograd&, const float*, const float*, const uint8_t*, int64_t, int64_t, float*))
FD_DECLARE(void winograd_unpack(
    const Winograd&, const float*, int64_t, int64_t, int64_t, float*))

namespace {

constexpr int64_t kTiles = 96;         // that are worth a task
constexpr int64_t kPartTiles = 256;    // that are worth sums of their own
constexpr int64_t kMaxParts = 32;
constexpr int64_t kMaxSums = 1 << 24;  // elements of all parts' sums

typedef std::unique_ptr<float[]> Floats;

void pack(const Winograd& w, const float* weight, int64_t begin, int64_t end, float* packed) {
  FD_DISPATCH(winograd_pack(w, weight, begin, end, packed))
}

void filter_tiles(
    const Winograd& w, const float* x, const uint8_t* pooled, const float* packed,
    const float* bias, float* y, uint8_t* index, int64_t begin, int64_t end) {
  FD_DISPATCH(winograd(w, x, pooled, packed, bias, y, index, begin, end))
}

void gradient_of_tiles(
    const Winograd& w, const float* x, const float* dy, const uint8_t* pooled, int64_t begin,
    int64_t end, float* sums) {
  FD_DISPATCH(winograd_gradient(w, x, dy, pooled, begin, end, sums))
}

void unpack(
    const Winograd& w, const float* sums, int64_t parts, int64_t begin, int64_t end,
    float* dweight) {
  FD_DISPATCH(winograd_unpack(w, sums, parts, begin, end, dweight))
}

void filter(
    const Winograd& w, const float* x, const uint8_t* pooled, const float* weight,
    const float* bias, float* y, uint8_t* index) {
  const Floats packed(new float[w.groups * w.weights]);
  parallel_ranges(w.padded_C, 1, [&](int64_t begin, int64_t end) {
    pack(w, weight, begin, end, packed.get());
  });
  parallel_ranges(w.tiles, kTiles, [&](int64_t begin, int64_t end) {
    filter_tiles(w, x, pooled, packed.get(), bias, y, index, begin, end);
  });
}

void weight_gradient(
    const Winograd& w, const float* x, const float* dy, const uint8_t* pooled, float* dweight) {
  if (w.tiles == 0) {
    std::fill_n(dweight, w.window.K * w.window.K * w.C * w.O, 0.0f);
    return;
  }
  // They depend on the shape alone, so that results do not depend on the threads.
  const int64_t most = std::max<int64_t>(1, std::min(kMaxParts, kMaxSums / w.weights));
  const int64_t parts = std::min(most, (w.tiles + kPartTiles - 1) / kPartTiles);
  const Floats sums(new float[parts * w.weights]);
  parallel_for(parts, [&](int64_t p) {
    gradient_of_tiles(
        w, x, dy, pooled, p * w.tiles / parts, (p + 1) * w.tiles / parts,
        sums.get() + p * w.weights);
  });
  parallel_ranges(w.C, 1, [&](int64_t begin, int64_t end) {
    unpack(w, sums.get(), parts, begin, end, dweight);
  });
}

int32_t check(const fd_conv* conv) {
  const int32_t error = check_conv(conv);
  if (error) return error;
  return conv->input == FD_FLOAT32 && conv->output == FD_FLOAT32 ? FD_OK : FD_ERROR_DTYPE;
}

}  // namespace
}  // namespace fastdreamer

int32_t fd_winograd(const fd_conv* conv) {
  using namespace fastdreamer;
  if (const int32_t error = check(conv)) return error;
  if (conv->N == 0) return FD_OK;
  if (any_null({conv->weight, conv->y})) return FD_ERROR_NULL_POINTER;
  filter(
      winograd_of(kForward[conv->kind], conv->N, conv->H, conv->W, conv->C, conv->O),
      static_cast<const float*>(conv->x), nullptr, conv->weight, conv->bias,
      static_cast<float*>(conv->y),
      conv->kind == FD_CONV_POOL ? static_cast<uint8_t*>(conv->index) : nullptr);
  return FD_OK;
}

int32_t fd_winograd_backward(const fd_conv* conv, const fd_conv_grad* grad) {
  using namespace fastdreamer;
  if (const int32_t error = check(conv)) return error;
  if (!grad || !grad->dweight) return FD_ERROR_NULL_POINTER;
  if (conv->N > 0 && (!grad->dy || (grad->dx && !grad->weight))) return FD_ERROR_NULL_POINTER;
  const bool pools = conv->kind == FD_CONV_POOL, halves = conv->kind == FD_CONV_STRIDE;
  const uint8_t* index = pools ? static_cast<const uint8_t*>(conv->index) : nullptr;
  const int64_t N = conv->N, C = conv->C, O = conv->O;
  // Of the gradient, before pooling.
  const int64_t H = pools ? conv->H : halves ? conv->H / 2 : 2 * conv->H;
  const int64_t W = pools ? conv->W : halves ? conv->W / 2 : 2 * conv->W;
  const Winograd forth = winograd_of(kForward[conv->kind], N, conv->H, conv->W, C, O);
  const Winograd back = winograd_of(kBackward[conv->kind], N, H, W, O, C);
  const float *x = static_cast<const float*>(conv->x), *dy = static_cast<const float*>(grad->dy);
  if (grad->dx && N > 0)
    filter(back, dy, index, grad->weight, nullptr, static_cast<float*>(grad->dx), nullptr);
  if (shrinks(*conv)) weight_gradient(forth, x, dy, index, grad->dweight);
  else weight_gradient(back, dy, x, nullptr, grad->dweight);
  return FD_OK;
}
