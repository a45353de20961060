// ret[t] = reward[t] + discount[t] * ((1 - lam[t]) * value[t] + lam[t] * ret[t + 1]),
// ret[T] = value[T - 1]: a recursion over t, independent for each row.
#include <algorithm>

#include "tensor.h"

namespace fastdreamer {
namespace {

// Rows that advance together: their recursions are independent and hide each other's latency.
constexpr int64_t kRows = 4;

template <typename scalar>
using Input = Matrix<const scalar>;

// Rows start .. start + rows - 1; `rows` is a constant where the compiler sees one.
template <typename scalar>
inline void advance(
    Input<scalar> reward, Input<scalar> discount, Input<scalar> value, Input<scalar> lam,
    Matrix<scalar> ret, int64_t start, int64_t rows, int64_t T) {
  scalar next[kRows];
  for (int64_t i = 0; i < rows; ++i) next[i] = value(start + i, T - 1);
  for (int64_t t = T - 1; t >= 0; --t) {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t n = start + i;
      const scalar mix = (1 - lam(n, t)) * value(n, t) + lam(n, t) * next[i];
      next[i] = reward(n, t) + discount(n, t) * mix;
      ret(n, t) = next[i];
    }
  }
}

template <typename scalar>
void lambda_return_fwd_kernel(
    Input<scalar> reward, Input<scalar> discount, Input<scalar> value, Input<scalar> lam,
    Matrix<scalar> ret, int64_t N, int64_t T) {
  int64_t n = 0;
  for (; n + kRows <= N; n += kRows) advance(reward, discount, value, lam, ret, n, kRows, T);
  for (; n < N; ++n) advance(reward, discount, value, lam, ret, n, 1, T);
}

// G[t] = dret[t] + discount[t - 1] * lam[t - 1] * G[t - 1] is the whole gradient of ret[t]; then
//   dreward = G               ddiscount = G * ((1 - lam) * value + lam * ret[t + 1])
//   dvalue = G * discount * (1 - lam)        dlam = G * discount * (ret[t + 1] - value)
// and value[T - 1] also receives what reaches ret[T].
template <typename scalar>
void lambda_return_bwd_kernel(
    Input<scalar> dret, Input<scalar> discount, Input<scalar> value, Input<scalar> lam,
    Input<scalar> ret, Matrix<scalar> dreward, Matrix<scalar> ddiscount, Matrix<scalar> dvalue,
    Matrix<scalar> dlam, int64_t N, int64_t T) {
  for (int64_t n = 0; n < N; ++n) {
    scalar carried = 0;
    for (int64_t t = 0; t < T; ++t) {
      const scalar g = dret(n, t) + carried;
      const scalar next = t + 1 < T ? ret(n, t + 1) : value(n, t);
      const scalar l = lam(n, t), v = value(n, t), gd = g * discount(n, t);
      dreward(n, t) = g;
      ddiscount(n, t) = g * ((1 - l) * v + l * next);
      dvalue(n, t) = gd * (1 - l);
      dlam(n, t) = gd * (next - v);
      carried = gd * l;
    }
    dvalue(n, T - 1) += carried;
  }
}

}  // namespace
}  // namespace fastdreamer

int32_t fd_lambda_return(
    const void* reward, const int64_t* reward_strides,
    const void* discount, const int64_t* discount_strides,
    const void* value, const int64_t* value_strides,
    const void* lam, const int64_t* lam_strides,
    void* ret,
    int64_t N, int64_t T, int32_t dtype, void*) {
  using namespace fastdreamer;
  if (N < 0 || T < 0) return FD_ERROR_SIZE;
  return with_float_type(dtype, [&](auto zero) -> int32_t {
    using scalar = decltype(zero);
    if (N == 0 || T == 0) return FD_OK;
    if (any_null({reward, reward_strides, discount, discount_strides, value, value_strides,
                  lam, lam_strides, ret}))
      return FD_ERROR_NULL_POINTER;
    lambda_return_fwd_kernel<scalar>(
        input<scalar>(reward, reward_strides), input<scalar>(discount, discount_strides),
        input<scalar>(value, value_strides), input<scalar>(lam, lam_strides),
        output<scalar>(ret, T), N, T);
    return FD_OK;
  });
}

int32_t fd_lambda_return_backward(
    const void* dret, const int64_t* dret_strides,
    const void* discount, const int64_t* discount_strides,
    const void* value, const int64_t* value_strides,
    const void* lam, const int64_t* lam_strides,
    const void* ret, const int64_t* ret_strides,
    void* dreward, void* ddiscount, void* dvalue, void* dlam,
    int64_t N, int64_t T, int32_t dtype, void*) {
  using namespace fastdreamer;
  if (N < 0 || T < 0) return FD_ERROR_SIZE;
  return with_float_type(dtype, [&](auto zero) -> int32_t {
    using scalar = decltype(zero);
    if (N == 0 || T == 0) return FD_OK;
    if (any_null({dret, dret_strides, discount, discount_strides, value, value_strides, lam,
                  lam_strides, ret, ret_strides, dreward, ddiscount, dvalue, dlam}))
      return FD_ERROR_NULL_POINTER;
    lambda_return_bwd_kernel<scalar>(
        input<scalar>(dret, dret_strides), input<scalar>(discount, discount_strides),
        input<scalar>(value, value_strides), input<scalar>(lam, lam_strides),
        input<scalar>(ret, ret_strides), output<scalar>(dreward, T),
        output<scalar>(ddiscount, T), output<scalar>(dvalue, T), output<scalar>(dlam, T), N, T);
    return FD_OK;
  });
}
