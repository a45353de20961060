// Views of the caller's tensors, and the checks that every operator makes before it computes.
#ifndef FASTDREAMER_CPU_TENSOR_H
#define FASTDREAMER_CPU_TENSOR_H

#include <initializer_list>

#include "check.h"
#include "parallel.h"

namespace fastdreamer {

// A matrix with strides in elements, one of which may be 0.
template <typename scalar>
struct Matrix {
  scalar* data;
  int64_t row_stride, column_stride;

  scalar& operator()(int64_t row, int64_t column) const {
    return data[row * row_stride + column * column_stride];
  }
};

template <typename scalar>
Matrix<const scalar> input(const void* data, const int64_t* strides) {
  return {static_cast<const scalar*>(data), strides[0], strides[1]};
}

template <typename scalar>
Matrix<scalar> output(void* data, int64_t columns) {
  return {static_cast<scalar*>(data), columns, 1};
}

// What body returns for a value of the C++ type that dtype names.
template <typename Body>
int32_t with_float_type(int32_t dtype, Body body) {
  switch (dtype) {
    case FD_FLOAT32: return body(float{});
    case FD_FLOAT64: return body(double{});
    default: return FD_ERROR_DTYPE;
  }
}

// Checks what operators over N float32 rows of K elements have in common, then calls
// body(begin, end) for ranges of rows.
template <typename Body>
int32_t by_row_ranges(
    std::initializer_list<const void*> pointers, int64_t N, int64_t K, int32_t dtype,
    const Body& body) {
  constexpr int64_t kGrain = 16384;  // elements that are worth a thread of their own
  if (N < 0 || K < 1 || K > INT32_MAX) return FD_ERROR_SIZE;
  if (dtype != FD_FLOAT32) return FD_ERROR_DTYPE;
  if (N == 0) return FD_OK;
  if (any_null(pointers)) return FD_ERROR_NULL_POINTER;
  parallel_ranges(N, (kGrain + K - 1) / K, body);
  return FD_OK;
}

}  // namespace fastdreamer

#endif
