// One step of either recurrent cell. Rows are independent of one another: parts of a few dozen go
// through the whole step, so that what lies between its layers stays in the cache.
#include "gates.h"
#include "parallel.h"

namespace fastdreamer {
namespace FD_ISA {
namespace {

constexpr int64_t kMostRows = 48;  // of a part: a multiple of every kTile

// It depends on the number of rows alone, so that sums over rows do not depend on the threads.
int64_t rows_of_part(int64_t rows) {
  const int64_t quarter = (rows + 4 * kTile - 1) / (4 * kTile) * kTile;
  return quarter < kTile ? kTile : quarter < kMostRows ? quarter : kMostRows;
}

// Views of contiguous tensors from a part's first row on.
struct Part {
  int64_t begin;

  template <typename T>
  Rows<T> operator()(T* data, int64_t width) const {
    return {data ? data + begin * width : nullptr, width};
  }
};

// Calls body(part, its first row, its number of rows).
template <typename Body>
void by_parts(int64_t rows, const Body& body) {
  const int64_t step = rows_of_part(rows);
  parallel_for((rows + step - 1) / step, [&](int64_t i) {
    const int64_t begin = i * step;
    body(i, Part{begin}, rows - begin < step ? rows - begin : step);
  });
}

}  // namespace

void gru_step(
    const fd_gru& cell, int64_t rows, const float* h, const float* x, float* hidden, float* gates,
    float* next) {
  const Gates packed(cell);
  const int64_t D = cell.deter;
  by_parts(rows, [&](int64_t, Part at, int64_t M) {
    const TileScope tiles;
    const Buffer scratch(packed.scratch(M));
    packed.step(
        M, at(h, D), at(x, cell.inputs), at(hidden, D), at(gates, 3 * D), at(next, D),
        scratch.get());
  });
}

void gru_step_backward(
    const fd_gru& cell, int64_t rows, const float* h, const float* hidden, const float* gates,
    const float* dnext, float* dh, float* dx, float* dhidden, float* dgates, float* dnorm) {
  const GatesGrad packed(cell);
  const int64_t D = cell.deter, size = 2 * cell_width(cell);
  const int64_t step = rows_of_part(rows), parts = (rows + step - 1) / step;
  const Buffer sums(parts * size);
  fill(sums.get(), 0, parts * size);
  by_parts(rows, [&](int64_t part, Part at, int64_t M) {
    const TileScope tiles;
    const Buffer scratch(packed.scratch(M));
    const Rows<float> dinputs = at(dx, cell.inputs);
    fill(dinputs.data, 0, M * cell.inputs);
    packed.step(
        M, at(h, D), at(hidden, D), at(gates, 3 * D), at(dnext, D), at(dhidden, D),
        at(dgates, 3 * D), at(dh, D), dinputs, sums.get() + part * size, scratch.get());
  });
  fill(dnorm, 0, size);
  for (int64_t i = 0; i < parts; ++i) add(sums.get() + i * size, dnorm, size);
}

}  // namespace FD_ISA
}  // namespace fastdreamer
