// The policy step at the C boundary; the work is in simd/.
#include "check.h"
#include "isa.h"

namespace fastdreamer {

FD_DECLARE(void policy_step(const fd_rssm&, const fd_act&))

namespace {

void dispatch(const fd_rssm& model, const fd_act& step) {
  FD_DISPATCH(policy_step(model, step))
}

}  // namespace
}  // namespace fastdreamer

int32_t fd_policy_step(const fd_rssm* model, const fd_act* step, fd_launch*) {
  using namespace fastdreamer;
  if (int32_t error = check_policy_step(model, step)) return error;
  if (step->N > 0) dispatch(*model, *step);
  return FD_OK;
}
