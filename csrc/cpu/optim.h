// Scalars of one optimiser step, for a tensor.
#ifndef FASTDREAMER_CPU_OPTIM_H
#define FASTDREAMER_CPU_OPTIM_H

namespace fastdreamer {

struct LaPropStep {
  float scale;     // of the gradient
  float nu_rate;   // 1 - beta2
  float nu_scale;  // 1 / (1 - beta2^step)
  float mu_rate;   // 1 - beta1
  float rate;      // lr / (1 - beta1^step)
  float eps;
};

struct AdamStep {
  float scale;     // of the gradient
  float mu_rate;   // 1 - beta1
  float nu_rate;   // 1 - beta2
  float nu_scale;  // 1 / (1 - beta2^step)
  float rate;      // lr / (1 - beta1^step)
  float eps;
};

}  // namespace fastdreamer

#endif
