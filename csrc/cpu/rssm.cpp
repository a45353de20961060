// The scans of the recurrent state-space model at the C boundary; the work is in simd/.
#include "check.h"
#include "isa.h"

namespace fastdreamer {

FD_DECLARE_PRODUCTS(void rssm_observe(const fd_rssm&, const fd_observe&))
FD_DECLARE_PRODUCTS(void rssm_observe_backward(
    const fd_rssm&, const fd_observe&, const fd_observe_grad&))
FD_DECLARE_PRODUCTS(void rssm_imagine(const fd_rssm&, const fd_imagine&))

namespace {

// Whether all are classes, or -1 for none.
bool are_classes(const int32_t* index, int64_t count, int64_t classes) {
  bool valid = true;
  for (int64_t i = 0; i < count; ++i) valid &= index[i] >= -1 && index[i] < classes;
  return valid;
}

bool are_start_classes(const fd_rssm& model, const fd_observe& scan) {
  return are_classes(scan.start_index, scan.B * model.stoch, model.classes) &&
         are_classes(scan.initial_index, model.stoch, model.classes);
}

// What the products multiply in.
int32_t compute_of(const fd_launch* launch) { return launch ? launch->compute : FD_FLOAT32; }

void observe(const fd_rssm& model, const fd_observe& scan, int32_t compute) {
  FD_DISPATCH_PRODUCTS(compute, rssm_observe(model, scan))
}
void observe_backward(
    const fd_rssm& model, const fd_observe& scan, const fd_observe_grad& grad, int32_t compute) {
  FD_DISPATCH_PRODUCTS(compute, rssm_observe_backward(model, scan, grad))
}
void imagine(const fd_rssm& model, const fd_imagine& args, int32_t compute) {
  FD_DISPATCH_PRODUCTS(compute, rssm_imagine(model, args))
}

}  // namespace
}  // namespace fastdreamer

int32_t fd_rssm_observe(const fd_rssm* model, const fd_observe* scan, fd_launch* launch) {
  using namespace fastdreamer;
  if (!is_compute(compute_of(launch))) return FD_ERROR_DTYPE;
  if (int32_t error = check_observe(model, scan)) return error;
  if (scan->B == 0 || scan->T == 0) return FD_OK;
  if (!are_start_classes(*model, *scan)) return FD_ERROR_INDEX;
  observe(*model, *scan, compute_of(launch));
  return FD_OK;
}

int32_t fd_rssm_observe_backward(
    const fd_rssm* model, const fd_observe* scan, const fd_observe_grad* grad, fd_launch* launch) {
  using namespace fastdreamer;
  if (!is_compute(compute_of(launch))) return FD_ERROR_DTYPE;
  if (int32_t error = check_observe(model, scan)) return error;
  if (int32_t error = check_observe_grad(*model, *scan, grad)) return error;
  if (scan->B > 0 && scan->T > 0 && !are_start_classes(*model, *scan)) return FD_ERROR_INDEX;
  observe_backward(*model, *scan, *grad, compute_of(launch));
  return FD_OK;
}

int32_t fd_rssm_imagine(const fd_rssm* model, const fd_imagine* rollout, fd_launch* launch) {
  using namespace fastdreamer;
  if (!is_compute(compute_of(launch))) return FD_ERROR_DTYPE;
  if (int32_t error = check_imagine(model, rollout)) return error;
  if (rollout->N == 0) return FD_OK;
  if (!are_classes(rollout->start_index, rollout->N * model->stoch, model->classes))
    return FD_ERROR_INDEX;
  imagine(*model, *rollout, compute_of(launch));
  return FD_OK;
}
