// Optimiser steps over lists of tensors, cut into blocks of a fixed size: sums over blocks are
// added in their order, so results do not depend on the number of threads.
#include "optim.h"

#include <math.h>

#include <vector>

#include "isa.h"
#include "parallel.h"
#include "tensor.h"

namespace fastdreamer {

FD_DECLARE(double sum_of_squares(const float*, int64_t))
FD_DECLARE(void laprop_step(float*, const float*, float*, float*, int64_t, const LaPropStep&))
FD_DECLARE(void adam_step(float*, const float*, float*, float*, int64_t, const AdamStep&))
FD_DECLARE(void ema(float*, const float*, int64_t, float))

namespace {

constexpr int64_t kBlock = 16384;
constexpr double kSmallestNorm = 1e-3;  // what a parameter's norm counts as at least
constexpr double kNormOffset = 1e-6;    // of clipping by the global norm, as PyTorch has it

struct Block {
  int64_t tensor, begin, size;
};

std::vector<Block> blocks_of(const int64_t* sizes, int64_t count) {
  std::vector<Block> blocks;
  for (int64_t t = 0; t < count; ++t)
    for (int64_t i = 0; i < sizes[t]; i += kBlock)
      blocks.push_back({t, i, sizes[t] - i < kBlock ? sizes[t] - i : kBlock});
  return blocks;
}

// The checks that lists of tensors need; `lists` are arrays of `count` pointers.
int32_t check(
    std::initializer_list<const void*> lists, const int64_t* sizes, int64_t count, int32_t dtype) {
  if (count < 0) return FD_ERROR_SIZE;
  if (dtype != FD_FLOAT32) return FD_ERROR_DTYPE;
  if (count > 0 && (sizes == nullptr || any_null(lists))) return FD_ERROR_NULL_POINTER;
  for (int64_t t = 0; t < count; ++t) {
    if (sizes[t] < 0) return FD_ERROR_SIZE;
    for (const void* list : lists)
      if (sizes[t] > 0 && static_cast<const void* const*>(list)[t] == nullptr)
        return FD_ERROR_NULL_POINTER;
  }
  return FD_OK;
}

double block_norm(const float* const* tensors, const Block& block) {
  FD_DISPATCH(sum_of_squares(tensors[block.tensor] + block.begin, block.size))
}

// The sums of squares of each tensor of a list.
std::vector<double> squares(
    const float* const* tensors, int64_t count, const std::vector<Block>& blocks) {
  std::vector<double> parts(blocks.size()), totals(count);
  parallel_for(blocks.size(), [&](int64_t i) { parts[i] = block_norm(tensors, blocks[i]); });
  for (size_t i = 0; i < blocks.size(); ++i) totals[blocks[i].tensor] += parts[i];
  return totals;
}

double norm_of_all(const std::vector<double>& squares) {
  double total = 0;
  for (const double square : squares) total += square;
  return sqrt(total);
}

// What scales a gradient so that its norm is at most clip times its parameter's; NaN stays.
float clip_scale(double grad_squares, double param_squares, double clip) {
  const double norm = sqrt(param_squares);
  const double ratio = sqrt(grad_squares) / (clip * (norm < kSmallestNorm ? kSmallestNorm : norm));
  return static_cast<float>(ratio < 1 ? 1 : 1 / ratio);
}

}  // namespace
}  // namespace fastdreamer

using namespace fastdreamer;

int32_t fd_agc_laprop(
    float* const* params, const float* const* grads, float* const* nu, float* const* mu,
    const int64_t* sizes, int64_t count, int64_t step, double lr, double clip, double beta1,
    double beta2, double eps, double* grad_norm, int32_t dtype, void*) {
  if (step < 1) return FD_ERROR_SIZE;
  if (const int32_t error = check({params, grads, nu, mu}, sizes, count, dtype)) return error;
  if (grad_norm == nullptr) return FD_ERROR_NULL_POINTER;
  const std::vector<Block> blocks = blocks_of(sizes, count);
  const std::vector<double> of_params = squares(params, count, blocks);
  const std::vector<double> of_grads = squares(grads, count, blocks);
  *grad_norm = norm_of_all(of_grads);
  parallel_for(blocks.size(), [&](int64_t i) {
    const int64_t t = blocks[i].tensor, at = blocks[i].begin, n = blocks[i].size;
    const LaPropStep scalars{
        clip_scale(of_grads[t], of_params[t], clip),
        static_cast<float>(1 - beta2),
        static_cast<float>(1 / (1 - pow(beta2, step))),
        static_cast<float>(1 - beta1),
        static_cast<float>(lr / (1 - pow(beta1, step))),
        static_cast<float>(eps)};
    FD_DISPATCH(laprop_step(params[t] + at, grads[t] + at, nu[t] + at, mu[t] + at, n, scalars))
  });
  return FD_OK;
}

int32_t fd_clip_adam(
    float* const* params, const float* const* grads, float* const* nu, float* const* mu,
    const int64_t* sizes, int64_t count, int64_t step, double lr, double clip, double beta1,
    double beta2, double eps, double* grad_norm, int32_t dtype, void*) {
  if (step < 1) return FD_ERROR_SIZE;
  if (const int32_t error = check({params, grads, nu, mu}, sizes, count, dtype)) return error;
  if (grad_norm == nullptr) return FD_ERROR_NULL_POINTER;
  const std::vector<Block> blocks = blocks_of(sizes, count);
  *grad_norm = norm_of_all(squares(grads, count, blocks));
  const double scale = clip / (*grad_norm + kNormOffset);
  const AdamStep scalars{
      static_cast<float>(scale > 1 ? 1 : scale),  // NaN stays
      static_cast<float>(1 - beta1),
      static_cast<float>(1 - beta2),
      static_cast<float>(1 / (1 - pow(beta2, step))),
      static_cast<float>(lr / (1 - pow(beta1, step))),
      static_cast<float>(eps)};
  parallel_for(blocks.size(), [&](int64_t i) {
    const int64_t t = blocks[i].tensor, at = blocks[i].begin, n = blocks[i].size;
    FD_DISPATCH(adam_step(params[t] + at, grads[t] + at, nu[t] + at, mu[t] + at, n, scalars))
  });
  return FD_OK;
}

int32_t fd_ema(
    float* const* targets, const float* const* params, const int64_t* sizes, int64_t count,
    double rate, int32_t dtype, void*) {
  if (const int32_t error = check({targets, params}, sizes, count, dtype)) return error;
  const std::vector<Block> blocks = blocks_of(sizes, count);
  parallel_for(blocks.size(), [&](int64_t i) {
    const int64_t t = blocks[i].tensor, at = blocks[i].begin;
    FD_DISPATCH(ema(targets[t] + at, params[t] + at, blocks[i].size, static_cast<float>(rate)))
  });
  return FD_OK;
}
