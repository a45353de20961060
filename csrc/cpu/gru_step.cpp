// One step of either recurrent cell at the C boundary; the work is in simd/.
#include "gru.h"
#include "isa.h"
#include "tensor.h"

namespace fastdreamer {

FD_DECLARE(void gru_step(
    const fd_gru&, int64_t, const float*, const float*, float*, float*, float*))
FD_DECLARE(void gru_step_backward(
    const fd_gru&, int64_t, const float*, const float*, const float*, const float*, float*, float*,
    float*, float*, float*))

int32_t check_gru(const fd_gru& cell) {
  const bool blocks = cell.cell == FD_CELL_BLOCK_GRU;
  if (!blocks && (cell.cell != FD_CELL_GRU || cell.blocks != 1)) return FD_ERROR_SIZE;
  if (cell.deter < 1 || cell.inputs < 1 || cell.blocks < 1 || cell.blocks > kMaxBlocks ||
      cell.deter % cell.blocks)
    return FD_ERROR_SIZE;
  if (any_null({cell.gate_weight, cell.scale})) return FD_ERROR_NULL_POINTER;
  if (blocks && any_null({cell.hidden_weight, cell.hidden_bias, cell.gate_bias}))
    return FD_ERROR_NULL_POINTER;
  return FD_OK;
}

namespace {

int32_t check(const fd_gru* cell, int64_t rows, std::initializer_list<const void*> tensors) {
  if (!cell) return FD_ERROR_NULL_POINTER;
  if (rows < 0) return FD_ERROR_SIZE;
  if (int32_t error = check_gru(*cell)) return error;
  return rows > 0 && any_null(tensors) ? FD_ERROR_NULL_POINTER : FD_OK;
}

void forward(
    const fd_gru& cell, int64_t rows, const float* h, const float* x, float* hidden, float* gates,
    float* next) {
  FD_DISPATCH(gru_step(cell, rows, h, x, hidden, gates, next))
}

void backward(
    const fd_gru& cell, int64_t rows, const float* h, const float* hidden, const float* gates,
    const float* dnext, float* dh, float* dx, float* dhidden, float* dgates, float* dnorm) {
  FD_DISPATCH(gru_step_backward(
      cell, rows, h, hidden, gates, dnext, dh, dx, dhidden, dgates, dnorm))
}

}  // namespace
}  // namespace fastdreamer

int32_t fd_gru_step(
    const fd_gru* cell, int64_t rows, const float* h, const float* x, float* hidden, float* gates,
    float* next) {
  using namespace fastdreamer;
  if (int32_t error = check(cell, rows, {h, x, gates, next})) return error;
  if (rows == 0) return FD_OK;
  if (cell->cell == FD_CELL_BLOCK_GRU && !hidden) return FD_ERROR_NULL_POINTER;
  forward(*cell, rows, h, x, hidden, gates, next);
  return FD_OK;
}

int32_t fd_gru_step_backward(
    const fd_gru* cell, int64_t rows, const float* h, const float* hidden, const float* gates,
    const float* dnext, float* dh, float* dx, float* dhidden, float* dgates, float* dnorm) {
  using namespace fastdreamer;
  if (int32_t error = check(cell, rows, {h, gates, dnext, dh, dx, dgates})) return error;
  const bool blocks = cell->cell == FD_CELL_BLOCK_GRU;
  if (!dnorm || (rows > 0 && blocks && any_null({hidden, dhidden}))) return FD_ERROR_NULL_POINTER;
  backward(*cell, rows, h, hidden, gates, dnext, dh, dx, dhidden, dgates, dnorm);
  return FD_OK;
}
