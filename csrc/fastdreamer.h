/* The C interface of fastdreamer's compiled operators, the same for every device.
 *
 * Tensors are raw pointers with their strides in elements, one per dimension; 0 is a valid
 * stride. Outputs are allocated by the caller, contiguous, and overlap nothing else. Every operator
 * returns FD_OK or an error code and touches nothing when it returns an error. `stream` is the
 * device's stream (a cudaStream_t); the CPU library ignores it and has finished when it returns. */
#ifndef FASTDREAMER_H
#define FASTDREAMER_H

#include <stdint.h>

#define FD_ABI_VERSION 9

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
  FD_ERROR_INDEX = 5,
  FD_ERROR_UNSUPPORTED = 6,
  FD_ERROR_WORKSPACE = 7,
  FD_ERROR_DEVICE = 1000, /* and above it the device's own error code */
};

enum fd_dtype {
  FD_FLOAT32 = 0,
  FD_FLOAT64 = 1,
  FD_BFLOAT16 = 2,
  FD_UINT8 = 3,
};

/* Instruction sets of the CPU library, each with what those before it have. The last two have
 * products in bfloat16; on the others, those asked for in bfloat16 are computed in float32. */
enum fd_isa {
  FD_ISA_PORTABLE = 0,
  FD_ISA_AVX2 = 1,
  FD_ISA_AVX512 = 2,
  FD_ISA_AVX512BF16 = 3,
  FD_ISA_AMX = 4,
};

FD_API int32_t fd_abi_version(void);
FD_API const char* fd_error_string(int32_t error);

/* The instruction set in use: the best that the processor has, or the last one set. */
FD_API int32_t fd_isa(void);
FD_API int32_t fd_set_isa(int32_t isa);

/* Lends the CPU library a pool of threads: the address of GOMP_parallel in the caller's OpenMP
 * runtime (null: one thread). */
FD_API int32_t fd_set_threads(void* gomp_parallel, int64_t threads);

/* How a scan runs. The CPU library reads `compute` alone and takes null for FD_FLOAT32. On another
 * device, where `workspace` is null, a call only sets workspace_bytes to what it needs there; any
 * contents will do. */
typedef struct fd_launch {
  int32_t compute; /* type of the products' factors: FD_FLOAT32 or FD_BFLOAT16; sums are float32 */
  void* workspace; /* on the device, aligned to 16 bytes */
  int64_t workspace_bytes;
  void* stream;
} fd_launch;

/* A linear layer, with norm and SiLU behind it where `scale` is not null. */
typedef struct fd_layer {
  const float* weight; /* (outputs, inputs), `stride` elements from row to row */
  const float* bias;   /* (outputs,) or null */
  const float* scale;  /* (outputs,) of the norm, or null */
  const float* shift;  /* (outputs,) of the norm, or null */
  int64_t inputs, outputs, stride;
} fd_layer;

enum fd_cell {
  FD_CELL_GRU = 0,       /* one input layer, joint product of state and input, LayerNorm */
  FD_CELL_BLOCK_GRU = 1, /* three input layers, block-linear hidden layer and gates, RMSNorm */
};

/* A recurrent state-space model with D = deter, S = stoch, K = classes, A = action, U = hidden,
 * G = blocks. All float32 and contiguous but for the layers' strides. */
typedef struct fd_rssm {
  int32_t cell;
  float eps; /* of every norm: LayerNorm with FD_CELL_GRU, else RMSNorm */
  float mix; /* weight of the uniform distribution in the latents */
  int64_t deter, stoch, classes, action, hidden, blocks;
  fd_layer in_stoch;  /* (U, S K); with FD_CELL_GRU its norm is that of the sum with in_action */
  fd_layer in_action; /* (U, A) */
  fd_layer in_deter;  /* (U, D); FD_CELL_BLOCK_GRU only */
  const float* hidden_weight; /* (G, D / G + 3 U, D / G): state, then deter, stoch, action */
  const float* hidden_bias;   /* (D,) */
  const float* gate_weight;   /* (3 D, D + U), or (G, D / G, 3 D / G) with blocks */
  const float* gate_bias;     /* (3 D,) with blocks */
  const float* cell_scale;    /* (3 D,) of the gates' norm, or (D,) of the hidden layer's */
  const float* cell_shift;    /* (3 D,) or null */
  fd_layer head[8]; /* observe: 2 layers of the posterior, the first without the embedding;
                     * imagine: `head_layers` of the prior, the last its logits */
  int64_t head_layers;
} fd_rssm;

/* Posterior scan of B rows over T steps. */
typedef struct fd_observe {
  int64_t B, T;
  const float* start_deter;    /* (B, D) */
  const int32_t* start_index;  /* (B, S) drawn class of each latent, -1: none */
  const float* initial_deter;  /* (D,) from where is_first */
  const int32_t* initial_index; /* (S,) */
  const float* action;         /* (B, T, A) before each step */
  const float* embedded;       /* (B, T, U) the embedding's share of the posterior's first layer */
  const uint8_t* is_first;     /* (B, T) */
  const float* noise;          /* (B, T, S, K) Gumbel */
  float* deter;                /* (B, T, D) */
  int32_t* index;              /* (B, T, S) */
  float* logp;                 /* (B, T, S, K) */
  float* inputs;               /* (B, T, U or 3 U) before the input layers' norms */
  float* hidden;               /* (B, T, D) before the hidden layer's norm; blocks only */
  float* gates;                /* (B, T, 3 D) before the LayerNorm, or with bias */
  float* posterior;            /* (B, T, U) before the posterior's norm */
} fd_observe;

FD_API int32_t fd_rssm_observe(const fd_rssm* model, const fd_observe* scan, fd_launch* launch);

/* Gradients of everything before a norm or, of the logits, behind the last product; what of the
 * weights follows is one product over all steps. */
typedef struct fd_observe_grad {
  const float* ddeter;  /* (B, T, D) */
  const float* dstoch;  /* (B, T, S, K) */
  const float* dlogp;   /* (B, T, S, K) */
  float* dinputs;       /* as fd_observe.inputs */
  float* dhidden;       /* as fd_observe.hidden; blocks only */
  float* dgates;        /* as fd_observe.gates */
  float* dposterior;    /* as fd_observe.posterior */
  float* dlogits;       /* (B, T, S, K) */
  float* dinitial;      /* (D,) */
  float* dnorm; /* scale and shift of the inputs' norms, the cell's, the posterior's */
} fd_observe_grad;

FD_API int32_t fd_rssm_observe_backward(
    const fd_rssm* model, const fd_observe* scan, const fd_observe_grad* grad, fd_launch* launch);

/* Rollout of N rows over H steps of the prior under a policy on features of deter and stoch. */
typedef struct fd_imagine {
  int64_t N, H;
  const float* start_deter;   /* (N, D) */
  const int32_t* start_index; /* (N, S) */
  const float* noise;         /* (N, H, S, K) Gumbel */
  const float* action_noise;  /* (N, H + 1, A) Gumbel, or normal where continuous */
  float* feat;                /* (N, H + 1, D + S K) */
  int32_t* index;             /* (N, H + 1, S) */
  float* action;              /* (N, H + 1, A) */
  float* hidden;              /* (N, H + 1, U) of the policy's last layer; or null, as for a GPU */
  float* kept;                /* of its layers as in fd_head, of N (H + 1) rows; or null likewise */
  const fd_layer* policy;     /* hidden layers, the first over D + S K features */
  int64_t policy_layers;
  int32_t deter_first;        /* order of the features */
  float policy_mix;           /* weight of the uniform distribution in discrete actions */
  int64_t parts;              /* of the action */
  const int64_t* part_sizes;  /* (parts,); they sum to A */
  const uint8_t* discrete;    /* (parts,) */
  const fd_layer* heads;      /* a discrete part: logits; a continuous one: mean, std */
} fd_imagine;

FD_API int32_t fd_rssm_imagine(
    const fd_rssm* model, const fd_imagine* rollout, fd_launch* launch);

/* One step of N environments: a posterior step, from the initial state and a zero action where
 * is_first, then the policy's action. Meant for few rows: weights are read as they lie. */
typedef struct fd_act {
  int64_t N;
  const float* deter;         /* (N, D) */
  const float* stoch;         /* (N, S, K) one-hot or zeros */
  const float* action;        /* (N, A) that followed them */
  const float* x;             /* (N, inputs of embedding[0]) of the observation */
  const uint8_t* is_first;    /* (N,) */
  const float* initial_deter; /* (D,) */
  const float* initial_stoch; /* (S, K) */
  const float* noise;         /* (N, S, K) Gumbel */
  const float* action_noise;  /* (N, A) as in fd_imagine */
  float* next_deter;          /* (N, D) */
  float* next_stoch;          /* (N, S, K) */
  float* next_action;         /* (N, A) */
  const fd_layer* embedding;  /* over x; the last is its share of head[0], with bias, no norm */
  int64_t embedding_layers;
  const fd_layer* policy;     /* this and all below as in fd_imagine */
  int64_t policy_layers;
  int32_t deter_first;
  float policy_mix;
  int64_t parts;
  const int64_t* part_sizes;
  const uint8_t* discrete;
  const fd_layer* heads;
} fd_act;

/* The model's head is that of fd_rssm_observe. */
FD_API int32_t fd_policy_step(const fd_rssm* model, const fd_act* step, fd_launch* launch);

/* The one-hot share of a linear layer, FD_FLOAT32: y (N, O) += for each of S latents the row of
 * table (S K, O) that its class names; index (N, S), -1: none. Backward: dtable += dy likewise. */
FD_API int32_t fd_latent_gather(
    const float* table, const int32_t* index, float* y, int64_t N, int64_t S, int64_t K, int64_t O,
    int32_t dtype, void* stream);
FD_API int32_t fd_latent_scatter(
    const float* dy, const int32_t* index, float* dtable, int64_t N, int64_t S, int64_t K,
    int64_t O, int32_t dtype, void* stream);

/* Layers behind one another on features: all but perhaps the last with a norm and SiLU, a LayerNorm
 * where `shift` is given, else an RMSNorm. */
typedef struct fd_head {
  const fd_layer* layers; /* the first over D + S K features */
  int64_t count;          /* 1 to 8 */
  const float* bins;      /* (outputs,) of a two-hot head, an odd number; or null */
  float* y;               /* (N, outputs), or with bins (N,): sum of softmax(outputs) bins */
  float* kept;            /* or null: for each layer with a norm what it took and, but for the last
                           * layer, what it gave, (N, outputs) behind one another */
} fd_head;

/* Heads on the same N features of deter and one-hot latents, FD_FLOAT32. */
typedef struct fd_heads {
  int64_t N, deter, stoch, classes;
  int32_t deter_first;  /* order of the features */
  float eps;            /* of every norm */
  const float* feat;    /* (N, D + S K) */
  const int32_t* index; /* (N, S) class of each latent, -1: all of its entries are 0 */
  const fd_head* heads;
  int64_t count;        /* 1 to 16 */
} fd_heads;

FD_API int32_t fd_run_heads(const fd_heads* heads);

/* A recurrent cell behind its input layers, over a state (rows, D) and an input x (rows, U);
 * G = blocks. */
typedef struct fd_gru {
  int32_t cell;
  float eps;
  int64_t deter, inputs, blocks;
  const float* hidden_weight; /* (G, D / G + U, D / G), state first; blocks only */
  const float* hidden_bias;   /* (D,); blocks only */
  const float* gate_weight;   /* (3 D, D + U), or (G, D / G, 3 D / G) with blocks */
  const float* gate_bias;     /* (3 D,); blocks only */
  const float* scale;         /* (3 D,) of the gates' norm, or (D,) of the hidden layer's */
  const float* shift;         /* (3 D,) or null */
} fd_gru;

/* One step: next (rows, D). hidden (rows, D; blocks only) and gates (rows, 3 D) are kept for the
 * backward pass, as in fd_observe. compute: as in fd_launch. */
FD_API int32_t fd_gru_step(
    const fd_gru* cell, int64_t rows, const float* h, const float* x, float* hidden, float* gates,
    float* next, int32_t compute);

/* Gradients of h, x, hidden and gates from dnext; what of the weights follows is one product. dnorm
 * (6 D, or 2 D with blocks): of the norm's scale, then of its shift. */
FD_API int32_t fd_gru_step_backward(
    const fd_gru* cell, int64_t rows, const float* h, const float* hidden, const float* gates,
    const float* dnext, float* dh, float* dx, float* dhidden, float* dgates, float* dnorm,
    int32_t compute);

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
 * shift may be null. dtype is of x and y (and of dy and dx): FD_FLOAT32, or FD_BFLOAT16 between
 * which float32 is computed; the others are FD_FLOAT32. */
FD_API int32_t fd_norm_act(
    const void* x, const void* scale, const void* shift, void* y,
    int64_t rows, int64_t n, int32_t centred, int32_t silu, float eps, int32_t dtype, void* stream);

/* The gradients of fd_norm_act's inputs from dy, the gradient of y, contiguous like x. dshift is
 * null exactly where shift is. Without rows dscale and dshift are zeros. */
FD_API int32_t fd_norm_act_backward(
    const void* dy, const void* x, const void* scale, const void* shift,
    void* dx, void* dscale, void* dshift,
    int64_t rows, int64_t n, int32_t centred, int32_t silu, float eps, int32_t dtype, void* stream);

/* How a convolution changes the size of its images. */
enum fd_conv_kind {
  FD_CONV_POOL = 0,      /* 5x5, padding 2, then the maximum of every 2x2; H and W even */
  FD_CONV_STRIDE = 1,    /* 4x4, stride 2, padding 1; H and W even */
  FD_CONV_UPSAMPLE = 2,  /* 5x5, padding 2, of the image with every pixel doubled both ways */
  FD_CONV_TRANSPOSE = 3, /* transposed 4x4, stride 2, padding 1 */
};

#define FD_CONV_BLOCK 16 /* images that are kept side by side; N' is N rounded up to it */

/* Convolution of N images, then, where `scale` is not null, norm over channels and SiLU as in
 * fd_norm_act. All contiguous; H' and W' are H and W doubled, or halved by POOL and STRIDE. At most
 * 2^24 for H W C, H W O and 2^24 / 40 for C O: the kernels hold sixteen images at once. */
typedef struct fd_conv {
  int32_t kind;    /* fd_conv_kind */
  int32_t input;   /* of x and its gradient: FD_FLOAT32, FD_BFLOAT16, or FD_UINT8: pixels taken as
                    * x / 255 - 0.5, without a gradient */
  int32_t output;  /* of y and its gradient: FD_FLOAT32 or FD_BFLOAT16 */
  int32_t centred; /* LayerNorm */
  float eps;
  int64_t N, H, W, C, O;
  const void* x;       /* (N, H, W, C) */
  const float* weight; /* (5, 5, C, O), (4, 4, C, O); for each parity of the output's row and column
                        * UPSAMPLE (2, 2, 3, 3, C, O), TRANSPOSE (2, 2, 2, 2, C, O) */
  const float* bias;   /* (O,) or null */
  const float* scale;  /* (O,) or null */
  const float* shift;  /* (O,) or null */
  void* y;             /* (N, H', W', O) */
  float* z;            /* (N' / 16, H', W', O, 16) before the norm, kept; or null without one */
  void* index;         /* which of its 2x2 each maximum was, POOL only: int32 (N' / 16, H', W', O / 16
                        * rounded up, 16), two bits for each of 16 channels */
} fd_conv;

FD_API int32_t fd_conv_norm_act(const fd_conv* conv);

/* Gradients from dy (N, H', W', O); conv.z and index are read, conv.weight, bias and y are not. The
 * input's gradient is itself a convolution, of the gradient before norm and pooling, with `weight`:
 * POOL (5, 5, O, C), STRIDE (2, 2, 2, 2, O, C) by parity of the input's row and column, UPSAMPLE
 * (6, 6, O, C), TRANSPOSE (4, 4, O, C). dweight is laid out like that for the kinds that enlarge,
 * like conv.weight for the others. */
typedef struct fd_conv_grad {
  const void* dy;
  const float* weight; /* may be null where dx is */
  void* dx;            /* (N, H, W, C), or null: not wanted */
  float* dweight;
  float* dbias;  /* (O,), as the next two; zeros without a norm */
  float* dscale;
  float* dshift;
} fd_conv_grad;

FD_API int32_t fd_conv_norm_act_backward(const fd_conv* conv, const fd_conv_grad* grad);

/* The same without a norm (scale, shift and z are not read), for many channels: by minimal filtering
 * (Winograd), which takes 2.6 to 4 times fewer products and rounds more. All FD_FLOAT32, index
 * uint8 (N, H', W', O). Backward, dbias, dscale and dshift are not written. */
FD_API int32_t fd_winograd(const fd_conv* conv);
FD_API int32_t fd_winograd_backward(const fd_conv* conv, const fd_conv_grad* grad);

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

/* Squared error of images of K elements, FD_FLOAT32 and contiguous: loss (N) is the sum over an image
 * of (p - (target / 255 - shift))^2, p = sigmoid(x) with `squash`, else x; x and target (N, K). */
FD_API int32_t fd_image_loss(
    const float* x, const uint8_t* target, float* loss, int64_t N, int64_t K, float shift,
    int32_t squash, int32_t dtype, void* stream);
FD_API int32_t fd_image_loss_backward(
    const float* dloss, const float* x, const uint8_t* target, float* dx, int64_t N, int64_t K,
    float shift, int32_t squash, int32_t dtype, void* stream);

/* Standard Gumbel noise y (N), FD_FLOAT32: -log(-log u) of the numbers u = (x / 2^9 + 1/2) / 2^23, x
 * the words of Philox4x32-10 with the bits of `seed` as its key. Counters go from 0 on; each 64
 * numbers are the first words of 16 of them, then their second, third and fourth words. */
FD_API int32_t fd_gumbel(int64_t seed, float* y, int64_t N, int32_t dtype, void* stream);

/* Two-hot cross-entropy of rows of K logits (K odd) over K ascending bins, summed over M targets y
 * in the bins' space; beyond the bins all weight lies on the end bin, and NaN stays NaN:
 *   loss = -(w * logp[below] + (1 - w) * logp[above])
 * stats receives what the gradient needs, the largest logit and the sum of e^(logit - largest).
 * logits (rows, K), y (rows, M), loss (rows,), bins (K,), stats (rows, 2), contiguous. float32 only. */
FD_API int32_t fd_twohot_loss(
    const void* logits, const void* y, const void* bins, void* loss, void* stats,
    int64_t M, int64_t rows, int64_t K, int32_t dtype, void* stream);

/* The gradient of fd_twohot_loss's logits from dloss, the gradient of loss. */
FD_API int32_t fd_twohot_loss_backward(
    const void* dloss, const void* logits, const void* y, const void* bins, const void* stats,
    void* dlogits, int64_t M, int64_t rows, int64_t K, int32_t dtype, void* stream);

/* Mean of softmax(logits) over the bins, antisymmetric around 0; exactly 0 for equal logits. */
FD_API int32_t fd_twohot_mean(
    const void* logits, const void* bins, void* mean,
    int64_t rows, int64_t K, int32_t dtype, void* stream);

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

/* Adam with clipping by global norm, as above: every gradient is multiplied by
 * min(clip / (grad_norm + 1e-6), 1), then
 *   mu += (1 - beta1) (g - mu)
 *   nu += (1 - beta2) (g^2 - nu)
 *   p -= lr / (1 - beta1^step) mu / (sqrt(nu / (1 - beta2^step)) + eps) */
FD_API int32_t fd_clip_adam(
    float* const* params, const float* const* grads, float* const* nu, float* const* mu,
    const int64_t* sizes, int64_t count, int64_t step, double lr, double clip, double beta1,
    double beta2, double eps, double* grad_norm, int32_t dtype, void* stream);

/* targets += rate (params - targets), lists as above. */
FD_API int32_t fd_ema(
    float* const* targets, const float* const* params, const int64_t* sizes, int64_t count,
    double rate, int32_t dtype, void* stream);

#ifdef __cplusplus
}
#endif

#endif
