// The posterior scan at the C boundary: what observe.h runs, planned and started.
#include "launch.h"
#include "observe.h"

namespace fastdreamer {
namespace {

template <typename Compute>
Plan<Observe> plan_observe(
    const fd_rssm& model, const fd_observe& scan, const fd_launch& launch, const Device& device) {
  Plan<Observe> plan;
  Observe& args = plan.args;
  args.model = forward_model(model);
  args.scan = scan;
  args.posterior_norm = norm_of(model, model.head[0]);
  args.out_bias = model.head[1].bias;
  args.by_deter = product_of(model.head[0]);
  args.out = by_latents(product_of(model.head[1]), model.classes);
  place_weights<Compute>(plan);
  const auto try_layout = [&](int members, bool* kept) {
    args.model.most_groups = most_groups(args.model.state, members);
    int width = staged_width(args.model);
    if (args.by_deter.padded() > width) width = args.by_deter.padded();
    if (args.out.padded() > width) width = args.out.padded();
    return lay_out<Compute, kObserveTiles>(args, width, members, device.shared, kept);
  };
  finish(plan, launch, device, ceil_div(scan.B, kObserveTiles * kTileRows), try_layout);
  args.shares = take<Share>(
      plan.workspace, launch, int64_t{plan.team.teams} * plan.team.members * kObserveTiles * kTileRows);
  return plan;
}

template <typename Compute>
int32_t observe(
    const fd_rssm& model, const fd_observe& scan, fd_launch* launch, const Device& device) {
  const Plan<Observe> plan = plan_observe<Compute>(model, scan, *launch, device);
  return run_plan<Compute, kObserveTiles>(plan, launch);
}

}  // namespace
}  // namespace fastdreamer

int32_t fd_rssm_observe(const fd_rssm* model, const fd_observe* scan, fd_launch* launch) {
  using namespace fastdreamer;
  if (int32_t error = check_observe(model, scan)) return error;
  Device device;
  if (int32_t error = check_launch(*model, launch, scan->B, scan->T, &device)) return error;
  if (scan->B == 0 || scan->T == 0) return nothing_to_run(launch);
  return launch->compute == FD_FLOAT32 ? observe<Float32>(*model, *scan, launch, device)
                                       : observe<Bfloat16>(*model, *scan, launch, device);
}
