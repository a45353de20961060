// One step of either recurrent cell at the C boundary; the work is in simd/.
#include "check.h"
#include "isa.h"

namespace fastdreamer {

FD_DECLARE_PRODUCTS(void gru_step(
    const fd_gru&, int64_t, const float*, const float*, float*, float*, float*))
FD_DECLARE_PRODUCTS(void gru_step_backward(
    const fd_gru&, int64_t, const float*, const float*, const float*, const float*, float*, float*,
    float*, float*, float*))

namespace {

int32_t check(
    const fd_gru* cell, int64_t rows, int32_t compute,
    std::initializer_list<const void*> tensors) {
  if (!is_compute(compute)) return FD_ERROR_DTYPE;
  if (!cell) return FD_ERROR_NULL_POINTER;
  if (rows < 0) return FD_ERROR_SIZE;
  if (int32_t error = check_gru(*cell)) return error;
  return rows > 0 && any_null(tensors) ? FD_ERROR_NULL_POINTER : FD_OK;
}

void forward(
    const fd_gru& cell, int64_t rows, const float* h, const float* x, float* hidden, float* gates,
    float* next, int32_t compute) {
  FD_DISPATCH_PRODUCTS(compute, gru_step(cell, rows, h, x, hidden, gates, next))
}

void backward(
    const fd_gru& cell, int64_t rows, const float* h, const float* hidden, const float* gates,
    const float* dnext, float* dh, float* dx, float* dhidden, float* dgates, float* dnorm,
    int32_t compute) {
  FD_DISPATCH_PRODUCTS(compute, gru_step_backward(
      cell, rows, h, hidden, gates, dnext, dh, dx, dhidden, dgates, dnorm))
}

}  // namespace
}  // namespace fastdreamer

int32_t fd_gru_step(
    const fd_gru* cell, int64_t rows, const float* h, const float* x, float* hidden, float* gates,
    float* next, int32_t compute) {
  using namespace fastdreamer;
  if (int32_t error = check(cell, rows, compute, {h, x, gates, next})) return error;
  if (rows == 0) return FD_OK;
  if (cell->cell == FD_CELL_BLOCK_GRU && !hidden) return FD_ERROR_NULL_POINTER;
  forward(*cell, rows, h, x, hidden, gates, next, compute);
  return FD_OK;
}

int32_t fd_gru_step_backward(
    const fd_gru* cell, int64_t rows, const float* h, const float* hidden, const float* gates,
    const float* dnext, float* dh, float* dx, float* dhidden, float* dgates, float* dnorm,
    int32_t compute) {
  using namespace fastdreamer;
  if (int32_t error = check(cell, rows, compute, {h, gates, dnext, dh, dx, dgates})) return error;
  const bool blocks = cell->cell == FD_CELL_BLOCK_GRU;
  if (!dnorm || (rows > 0 && blocks && any_null({hidden, dhidden}))) return FD_ERROR_NULL_POINTER;
  backward(*cell, rows, h, hidden, gates, dnext, dh, dx, dhidden, dgates, dnorm, compute);
  return FD_OK;
}
