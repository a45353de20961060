// The imagined rollout at the C boundary: what imagine.h runs, planned and started.
#include "imagine.h"
#include "launch.h"

namespace fastdreamer {
namespace {

DenseLayer dense(const fd_rssm& model, const fd_layer& layer) {
  return {product_of(layer), layer.bias, norm_of(model, layer)};
}

Product all_in_one_unit(Product p) {
  p.unit = p.group_tiles();
  return p;
}

Imagine arguments(const fd_rssm& model, const fd_imagine& rollout) {
  Imagine args{};
  args.model = forward_model(model);
  args.N = rollout.N, args.H = rollout.H;
  args.start_deter = rollout.start_deter, args.start_index = rollout.start_index;
  args.noise = rollout.noise, args.action_noise = rollout.action_noise;
  args.feat = rollout.feat, args.action = rollout.action, args.index = rollout.index;
  args.prior_layers = static_cast<int>(model.head_layers);
  args.layers = args.prior_layers + static_cast<int>(rollout.policy_layers);
  args.parts = static_cast<int>(rollout.parts);
  args.deter_first = rollout.deter_first;
  args.policy_mix = rollout.policy_mix;
  DenseLayer* policy = args.layer + args.prior_layers;
  for (int i = 0; i < args.prior_layers; ++i) args.layer[i] = dense(model, model.head[i]);
  for (int i = 0; i < rollout.policy_layers; ++i) policy[i] = dense(model, rollout.policy[i]);
  policy[-1].product = by_latents(policy[-1].product, model.classes);
  const fd_layer& first = rollout.policy[0];
  const int64_t latent = model.stoch * model.classes;
  const float* by_deter = first.weight + (args.deter_first ? 0 : latent);
  policy[0].product = product_of(by_deter, model.deter, first.outputs, first.stride);
  args.policy_table = table_of(first, first.weight + (args.deter_first ? model.deter : 0), latent);
  for (int i = 0, head = 0, begin = 0; i < args.parts; begin += args.part[i++].size) {
    args.part[i].begin = begin, args.part[i].size = static_cast<int>(rollout.part_sizes[i]);
    args.part[i].discrete = rollout.discrete[i];
    for (int j = 0; j < (args.part[i].discrete ? 1 : 2); ++j, ++head) {
      args.part[i].product[j] = all_in_one_unit(product_of(rollout.heads[head]));
      args.part[i].bias[j] = rollout.heads[head].bias;
    }
  }
  for (int i = 0; i < args.layers; ++i)
    if (args.layer[i].product.outputs > args.raw_width) args.raw_width = args.layer[i].product.outputs;
  return args;
}

int widest(const Imagine& args) {
  int most = staged_width(args.model);
  const auto see = [&](const Product& p) {
    if (p.padded() > most) most = p.padded();
  };
  for (int i = 0; i < args.layers; ++i) see(args.layer[i].product);
  see(args.part[0].product[0]);
  return most;
}

template <typename Compute, int MT>
int32_t imagine(
    const fd_rssm& model, const fd_imagine& rollout, fd_launch* launch, const Device& device) {
  Plan<Imagine> plan;
  Imagine& args = plan.args;
  args = arguments(model, rollout);
  place_weights<Compute>(plan);
  const int teams = ceil_div(rollout.N, MT * kTileRows);
  finish(plan, *launch, device, teams, [&](int members, bool* kept) {
    args.model.most_groups = most_groups(args.model.state, members);
    return lay_out<Compute, MT>(args, widest(args), members, device.shared, kept);
  });
  const int64_t rows = int64_t{teams} * MT * kTileRows;
  const auto floats = [&](int64_t width) { return take<float>(plan.workspace, *launch, rows * width); };
  args.inputs = floats(args.model.inputs);
  args.hidden = args.model.blocks ? floats(model.deter) : nullptr;
  args.gates = floats(3 * model.deter);
  args.raw[0] = floats(args.raw_width);
  args.raw[1] = floats(args.raw_width);
  args.head = floats(2 * model.action);
  args.shares = take<Share>(plan.workspace, *launch, rows * plan.team.members);
  return run_plan<Compute, MT>(plan, launch);
}

// In float32, for tests, teams of 16 rows. In bfloat16 as few teams as let each have a cluster of 8
// blocks, up to 64 rows: the weights that each reads in a step are the cost. Fewer rows where a
// block's memory does not hold them.
int32_t choose_rows(
    const fd_rssm& model, const fd_imagine& rollout, fd_launch* launch, const Device& device) {
  if (launch->compute == FD_FLOAT32) return imagine<Float32, 1>(model, rollout, launch, device);
  const int64_t rows = rollout.N * 8 / device.multiprocessors;  // of a team, were all clusters busy
  int32_t error = FD_ERROR_UNSUPPORTED;
  if (rows > 32) error = imagine<Bfloat16, 4>(model, rollout, launch, device);
  if (error == FD_ERROR_UNSUPPORTED && rows > 16)
    error = imagine<Bfloat16, 2>(model, rollout, launch, device);
  if (error == FD_ERROR_UNSUPPORTED) error = imagine<Bfloat16, 1>(model, rollout, launch, device);
  return error;
}

}  // namespace
}  // namespace fastdreamer

int32_t fd_rssm_imagine(const fd_rssm* model, const fd_imagine* rollout, fd_launch* launch) {
  using namespace fastdreamer;
  if (int32_t error = check_imagine(model, rollout)) return error;
  Device device;
  if (int32_t error = check_launch(*model, launch, rollout->N, rollout->H, &device)) return error;
  if (rollout->N == 0) return nothing_to_run(launch);
  if (rollout->parts > kMaxParts || rollout->hidden) return FD_ERROR_UNSUPPORTED;
  return choose_rows(*model, *rollout, launch, device);
}
