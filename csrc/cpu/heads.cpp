// Heads on the same features at the C boundary; the work is in simd/heads.cpp.
#include "check.h"
#include "isa.h"

namespace fastdreamer {

FD_DECLARE(void run_heads(const fd_heads&))

namespace {

void run(const fd_heads& args) { FD_DISPATCH(run_heads(args)) }

int32_t check(const fd_heads* pointer) {
  if (!pointer) return FD_ERROR_NULL_POINTER;
  const fd_heads& args = *pointer;
  if (args.N < 0 || args.deter < 1 || args.stoch < 1 || args.classes < 1 || args.count < 1 ||
      args.count > kMaxFeatureHeads)
    return FD_ERROR_SIZE;
  if (!args.heads) return FD_ERROR_NULL_POINTER;
  for (int64_t i = 0; i < args.count; ++i) {
    const fd_head& head = args.heads[i];
    if (head.count < 1 || head.count > kMaxLayers) return FD_ERROR_SIZE;
    if (!head.layers) return FD_ERROR_NULL_POINTER;
    const int64_t features = args.deter + args.stoch * args.classes;
    if (int32_t error = check_layers(head.layers, head.count, features, false)) return error;
    if (head.bins && head.layers[head.count - 1].outputs % 2 == 0) return FD_ERROR_SIZE;
    if (args.N > 0 && !head.y) return FD_ERROR_NULL_POINTER;
  }
  if (args.N == 0) return FD_OK;
  if (any_null({args.feat, args.index})) return FD_ERROR_NULL_POINTER;
  for (int64_t i = 0; i < args.N * args.stoch; ++i)
    if (args.index[i] < -1 || args.index[i] >= args.classes) return FD_ERROR_INDEX;
  return FD_OK;
}

}  // namespace
}  // namespace fastdreamer

int32_t fd_run_heads(const fd_heads* heads) {
  using namespace fastdreamer;
  if (int32_t error = check(heads)) return error;
  if (heads->N > 0) run(*heads);
  return FD_OK;
}
