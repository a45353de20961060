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

/* Categoricals: N rows of K >= 1 classes, contiguous, FD_FLOAT32; logp and logq are normalised
 * log-probabilities. unimix: logp = ln((1 - mix) softmax(logits) + mix / K), mix in 0..1. */
FD_API int32_t fd_unimix(
    const float* logits, float* logp, int64_t N, int64_t K, float mix, int32_t dtype,
    void* stream);
FD_API int32_t fd_unimix_backward(
    const float* dlogp, const float* logp, float* dlogits, int64_t N, int64_t K, float mix,
    int32_t dtype, void* stream);

/* entropy (N) = -sum(exp(logp) logp), in nats. */
FD_API int32_t fd_entropy(
    const float* logp, float* entropy, int64_t N, int64_t K, int32_t dtype, void* stream);
FD_API int32_t fd_entropy_backward(
    const float* dentropy, const float* logp, float* dlogp, int64_t N, int64_t K, int32_t dtype,
    void* stream);

/* kl (N) = sum(exp(logp) (logp - logq)), in nats. Backward, dp (N) is the gradient of the kl that
 * reaches logp and dq (N) the one that reaches logq. */
FD_API int32_t fd_kl(
    const float* logp, const float* logq, float* kl, int64_t N, int64_t K, int32_t dtype,
    void* stream);
FD_API int32_t fd_kl_backward(
    const float* dp, const float* dq, const float* logp, const float* logq, float* dlogp,
    float* dlogq, int64_t N, int64_t K, int32_t dtype, void* stream);

/* onehot of the largest logp + noise, the first of equals. Backward, the gradient is that of
 * exp(logp). */
FD_API int32_t fd_sample(
    const float* logp, const float* noise, float* onehot, int64_t N, int64_t K, int32_t dtype,
    void* stream);
FD_API int32_t fd_sample_backward(
    const float* donehot, const float* logp, float* dlogp, int64_t N, int64_t K, int32_t dtype,
    void* stream);

/* Lists of `count` contiguous FD_FLOAT32 tensors of sizes[i] elements, changed in place.
 * LaProp with adaptive gradient clipping, for step 1, 2, ...: each gradient is divided so that its
 * norm is at most clip max(norm of the parameter, 1e-3), then
 *   nu += (1 - beta2) (g^2 - nu)
 *   mu += (1 - beta1) (g / (sqrt(nu / (1 - beta2^step)) + eps) - mu)
 *   p -= lr / (1 - beta1^step) mu
 * grad_norm is the norm of all gradients before clipping. */
FD_API int32_t fd_agc_laprop(
    float* const* params, const float* const* grads, float* const* nu, float* const* mu,
    const int64_t* sizes, int64_t count, int64_t step, double lr, double clip, double beta1,
    double beta2, double eps, double* grad_norm, int32_t dtype, void* stream);

#ifdef __cplusplus
}
#endif

#endif
