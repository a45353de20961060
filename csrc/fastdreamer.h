/* The C interface of fastdreamer's compiled operators, the same for every device.
 *
 * Tensors are raw pointers with their strides in elements, one per dimension; 0 is a valid
 * stride. Outputs are allocated by the caller, contiguous, and overlap nothing else. Every operator
 * returns FD_OK or an error code and touches nothing when it returns an error. `stream` is the
 * device's stream (a cudaStream_t); the CPU library ignores it and has finished when it returns. */
#ifndef FASTDREAMER_H
#define FASTDREAMER_H

#include <stdint.h>

#define FD_ABI_VERSION 3

#if defined(__GNUC__)
#define FD_API __attribute__((visibility("default")))
#else
#define FD_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum fd_error {
  FD_OK = 0,
  FD_ERROR_NULL_POINTER = 1,
  FD_ERROR_SIZE = 2,
  FD_ERROR_DTYPE = 3,
  FD_ERROR_ISA = 4,
};

enum fd_dtype {
  FD_FLOAT32 = 0,
  FD_FLOAT64 = 1,
};

/* Instruction sets of the CPU library, from the slowest to the fastest. */
enum fd_isa {
  FD_ISA_PORTABLE = 0,
  FD_ISA_AVX2 = 1,
  FD_ISA_AVX512 = 2,
};

FD_API int32_t fd_abi_version(void);
FD_API const char* fd_error_string(int32_t error);

/* The instruction set in use: the best that the processor has, or the last one set. */
FD_API int32_t fd_isa(void);
FD_API int32_t fd_set_isa(int32_t isa);

/* Lends the CPU library a pool of threads: the address of GOMP_parallel in the caller's OpenMP
 * runtime (null: one thread). */
FD_API int32_t fd_set_threads(void* gomp_parallel, int64_t threads);

/* Lambda returns of N rows over T steps; all tensors (N, T):
 *   ret[t] = reward[t] + discount[t] * ((1 - lam[t]) * value[t] + lam[t] * ret[t + 1])
 * for t = T-1 .. 0, with ret[T] = value[T - 1]. */
FD_API int32_t fd_lambda_return(
    const void* reward, const int64_t* reward_strides,
    const void* discount, const int64_t* discount_strides,
    const void* value, const int64_t* value_strides,
    const void* lam, const int64_t* lam_strides,
    void* ret,
    int64_t N, int64_t T, int32_t dtype, void* stream);

/* The gradients of fd_lambda_return's four inputs from dret, the gradient of ret. */
FD_API int32_t fd_lambda_return_backward(
    const void* dret, const int64_t* dret_strides,
    const void* discount, const int64_t* discount_strides,
    const void* value, const int64_t* value_strides,
    const void* lam, const int64_t* lam_strides,
    const void* ret, const int64_t* ret_strides,
    void* dreward, void* ddiscount, void* dvalue, void* dlam,
    int64_t N, int64_t T, int32_t dtype, void* stream);

/* LayerNorm (centred) or RMSNorm of each row of x, then SiLU if `silu`:
 *   n = (x - mean) / sqrt(var + eps) * scale + shift,  y = n or n * sigmoid(n)
 * RMSNorm has mean 0 and the mean square for var. x, y (rows, n) contiguous; scale, shift (n,);
 * shift may be null. float32 only. */
FD_API int32_t fd_norm_act(
    const void* x, const void* scale, const void* shift, void* y,
    int64_t rows, int64_t n, int32_t centred, int32_t silu, float eps, int32_t dtype, void* stream);

/* The gradients of fd_norm_act's inputs from dy, the gradient of y, contiguous like x. dshift is
 * null exactly where shift is. Without rows dscale and dshift are zeros. */
FD_API int32_t fd_norm_act_backward(
    const void* dy, const void* x, const void* scale, const void* shift,
    void* dx, void* dscale, void* dshift,
    int64_t rows, int64_t n, int32_t centred, int32_t silu, float eps, int32_t dtype, void* stream);

/* Two-hot cross-entropy of rows of K logits (K odd) over K ascending bins, for a target y in the
 * bins' space; beyond the bins all weight lies on the end bin, and NaN stays NaN:
 *   loss = -(w * logp[below] + (1 - w) * logp[above])
 * stats receives what the gradient needs, the largest logit and the sum of e^(logit - largest).
 * logits (rows, K), y and loss (rows,), bins (K,), stats (rows, 2), contiguous. float32 only. */
FD_API int32_t fd_twohot_loss(
    const void* logits, const void* y, const void* bins, void* loss, void* stats,
    int64_t rows, int64_t K, int32_t dtype, void* stream);

/* The gradient of fd_twohot_loss's logits from dloss, the gradient of loss. */
FD_API int32_t fd_twohot_loss_backward(
    const void* dloss, const void* logits, const void* y, const void* bins, const void* stats,
    void* dlogits, int64_t rows, int64_t K, int32_t dtype, void* stream);

/* Mean of softmax(logits) over the bins, antisymmetric around 0; exactly 0 for equal logits. */
FD_API int32_t fd_twohot_mean(
    const void* logits, const void* bins, void* mean,
    int64_t rows, int64_t K, int32_t dtype, void* stream);

#ifdef __cplusplus
}
#endif

#endif
