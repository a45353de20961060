// The posterior scan's backward pass at the C boundary: what observe_grad.h runs.
#include "launch.h"
#include "observe_grad.h"

namespace fastdreamer {
namespace {

// The transposed weights of a step; see forward_model.
void set_products(const fd_rssm& m, ObserveGrad& args) {
  const int64_t D = m.deter, U = m.hidden, G = m.blocks, width = D / G;
  args.out = gradient_of(m.head[1]);
  args.by_deter = grouped(gradient_of(m.head[0]), G);
  args.stoch = by_latents(gradient_of(m.in_stoch), m.classes);
  if (!args.model.blocks) {
    args.state = gradient_of({m.gate_weight, nullptr, nullptr, nullptr, D, 3 * D, D + U});
    args.input = gradient_of({m.gate_weight + D, nullptr, nullptr, nullptr, U, 3 * D, D + U});
    args.model.state = gates_of(product_of(nullptr, 0, 3 * D, 0));
    return;
  }
  args.in_deter = grouped(gradient_of(m.in_deter), G);
  // From the outputs of a group to its inputs, in a weight of (groups, all inputs, outputs).
  const auto of_groups = [&](const float* weight, int64_t inputs, int64_t all_inputs, int64_t outputs) {
    Product p = grouped(product_of(weight, outputs, inputs * G, outputs), G);
    p.group_stride = static_cast<int>(all_inputs * outputs);
    return p;
  };
  args.gates = of_groups(m.gate_weight, width, width, 3 * width);
  args.state = of_groups(m.hidden_weight, width, width + 3 * U, width);
  args.input = product_of(m.hidden_weight + width * width, D, 3 * U, width);
  args.input.in_width = static_cast<int>(width);
  args.input.in_group_stride = static_cast<int>((width + 3 * U) * width);
}

int widest(const ObserveGrad& args) {
  const Model& m = args.model;
  int most = 0;
  for (int width : {args.out.padded(), args.by_deter.padded(), args.input.padded(),
                    m.blocks ? m.most_groups * args.gates.padded() : 0,
                    m.most_groups * args.state.padded(), (m.blocks ? 3 : 1) * args.stoch.padded()})
    if (width > most) most = width;
  return most;
}

NormGradients norm_gradients(const Model& m) {
  const int cell = 2 * m.inputs, posterior = cell + 2 * m.cell_norm.width;
  return {0, cell, posterior, posterior + 2 * m.hidden};
}

template <typename Compute>
int32_t backward(
    const fd_rssm& model, const fd_observe& scan, const fd_observe_grad& grad, fd_launch* launch,
    const Device& device) {
  Plan<ObserveGrad> plan;
  ObserveGrad& args = plan.args;
  args.model = model_of(model);
  args.scan = scan;
  args.grad = grad;
  args.posterior_norm = norm_of(model, model.head[0]);
  args.norms = norm_gradients(args.model);
  set_products(model, args);
  place_weights<Compute>(plan);
  const int teams = ceil_div(scan.B, kObserveTiles * kTileRows);
  finish(plan, *launch, device, teams, [&](int members, bool* kept) {
    args.model.most_groups = most_groups(args.model.units, members);
    return lay_out<Compute, kObserveTiles>(args, widest(args), members, device.shared, kept);
  });
  const int64_t rows = int64_t{teams} * kObserveTiles * kTileRows, shares = rows * plan.team.members;
  const auto floats = [&](int64_t count) { return take<float>(plan.workspace, *launch, count); };
  const auto slopes = [&](int64_t count) { return take<Slope>(plan.workspace, *launch, count); };
  args.moments = take<Moments>(plan.workspace, *launch, scan.B * scan.T * ObserveGrad::kMoments);
  args.carry = floats(rows * model.deter);
  args.dstoch = floats(rows * args.model.latent());
  args.dposterior = floats(rows * model.hidden);
  args.dcell = floats(rows * args.model.cell_norm.width);
  args.dinputs = floats(rows * args.model.inputs);
  args.posterior_slopes = slopes(shares);
  args.cell_slopes = slopes(shares);
  args.input_slopes = slopes(3 * shares);
  args.dnorm = floats(int64_t{teams} * args.norms.size);
  args.dinitial = floats(int64_t{teams} * model.deter);
  if (int32_t error = run_plan<Compute, kObserveTiles>(plan, launch)) return error;
  if (!launch->workspace) return FD_OK;
  return start_sums({args.dnorm, grad.dnorm, args.norms.size, teams},
                    {args.dinitial, grad.dinitial, static_cast<int>(model.deter), teams}, *launch);
}

int32_t zeros(const fd_rssm& model, const fd_observe_grad& grad, fd_launch* launch) {
  if (!launch->workspace) {
    launch->workspace_bytes = 1;  // so that the next call runs
    return FD_OK;
  }
  return start_sums({nullptr, grad.dnorm, norm_gradients(model_of(model)).size, 0},
                    {nullptr, grad.dinitial, static_cast<int>(model.deter), 0}, *launch);
}

}  // namespace
}  // namespace fastdreamer

int32_t fd_rssm_observe_backward(
    const fd_rssm* model, const fd_observe* scan, const fd_observe_grad* grad, fd_launch* launch) {
  using namespace fastdreamer;
  if (int32_t error = check_observe(model, scan)) return error;
  if (int32_t error = check_observe_grad(*model, *scan, grad)) return error;
  Device device;
  if (int32_t error = check_launch(*model, launch, scan->B, scan->T, &device)) return error;
  if (scan->B == 0 || scan->T == 0) return zeros(*model, *grad, launch);
  return launch->compute == FD_FLOAT32
             ? backward<Float32>(*model, *scan, *grad, launch, device)
             : backward<Bfloat16>(*model, *scan, *grad, launch, device);
}
