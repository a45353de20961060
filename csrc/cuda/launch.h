// Starts kernels: on a GPU, or on the host as threads.
#ifndef FASTDREAMER_CUDA_LAUNCH_H
#define FASTDREAMER_CUDA_LAUNCH_H

#include "plan.h"

#ifndef __CUDACC__
#include <memory>
#include <thread>
#include <vector>
#endif

namespace fastdreamer {

int32_t current_device(Device* device);

// The packed form of weights in Compute's type, shared out among `count` threads.
template <typename Compute>
FD_FN void pack(const Packing& packing, char* workspace, int64_t thread, int64_t count) {
  using Scalar = typename Compute::Scalar;
  for (int i = 0; i < packing.products; ++i) {
    const Product& p = packing.product[i];
    auto* to = reinterpret_cast<Scalar*>(workspace + p.packed);
    for (int64_t at = thread; at < p.weights(); at += count) to[at] = Compute::from(p.source(at));
  }
  for (int i = 0; i < packing.tables; ++i) {
    const Table& t = packing.table[i];
    auto* to = reinterpret_cast<Scalar*>(workspace + t.packed);
    for (int64_t at = thread; at < int64_t{t.inputs} * t.outputs; at += count)
      to[at] = Compute::from(t.weight[at % t.outputs * t.stride + at / t.outputs]);
  }
  for (int64_t i = thread; i < packing.teams; i += count) packing.arrived[i] = 0;
}

// A block's part of a kernel: its weights into shared memory, then all steps.
template <typename Compute, int MT, typename Block, typename Args>
FD_FN void run_block(Block& b, const Args& args, char* workspace) {
  const Memory<Compute, MT> memory{workspace, b.shared, args.layout};
  Args::each_product(args, [&](const Product& p) { memory.keep(b, p); });
  b.team_sync();
  args.template run<Compute, MT>(b, memory);
}

// to (size,) = the sum of `parts` rows of from, in their order.
struct PartialSums {
  const float* from;
  float* to;
  int size, parts;
};
FD_FN void sum_parts(const PartialSums& sums, int thread, int count) {
  for (int i = thread; i < sums.size; i += count) {
    float total = 0;
    for (int part = 0; part < sums.parts; ++part) total += sums.from[int64_t{part} * sums.size + i];
    sums.to[i] = total;
  }
}

#ifdef __CUDACC__
template <typename Compute>
__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ Packing packing, char* workspace) {
  pack<Compute>(packing, workspace, int64_t{blockIdx.x} * kThreads + threadIdx.x, int64_t{gridDim.x} * kThreads);
}

template <typename Compute, int MT, typename Args>
__global__ void __launch_bounds__(kThreads, 1)
    scan_kernel(const __grid_constant__ Args args, const __grid_constant__ Team team, char* workspace) {
  extern __shared__ __align__(16) char shared[];
  GpuBlock block(team, shared);
  run_block<Compute, MT>(block, args, workspace);
}

static __global__ void __launch_bounds__(kThreads)
    sum_kernel(const __grid_constant__ PartialSums a, const __grid_constant__ PartialSums b) {
  const int thread = blockIdx.x * kThreads + threadIdx.x, count = gridDim.x * kThreads;
  sum_parts(a, thread, count), sum_parts(b, thread, count);
}

inline int32_t error_of(cudaError_t error) {
  return error == cudaSuccess ? FD_OK : FD_ERROR_DEVICE + static_cast<int32_t>(error);
}

template <typename Compute, int MT, typename Args>
int32_t start(const Packing& packing, const Args& args, const Team& team, const fd_launch& launch) {
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  char* workspace = static_cast<char*>(launch.workspace);
  pack_kernel<Compute><<<512, kThreads, 0, stream>>>(packing, workspace);
  if (int32_t error = error_of(cudaGetLastError())) return error;
  const auto kernel = scan_kernel<Compute, MT, Args>;
  const int shared = args.layout.bytes();
  if (int32_t error = error_of(
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared)))
    return error;
  cudaLaunchAttribute attribute{};
  if (team.kind == kTeamCluster) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = team.members;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  } else {  // all blocks at once: they wait for one another
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(team.teams * team.members);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = team.kind == kTeamOfOne ? 0 : 1;
  return error_of(cudaLaunchKernelEx(&config, kernel, args, team, workspace));
}

inline int32_t start_sums(const PartialSums& a, const PartialSums& b, const fd_launch& launch) {
  sum_kernel<<<64, kThreads, 0, static_cast<cudaStream_t>(launch.stream)>>>(a, b);
  return error_of(cudaGetLastError());
}
#else
extern int emulated_warps;  // of a block

template <typename Compute, int MT, typename Args>
int32_t start(const Packing& packing, const Args& args, const Team& team, const fd_launch& launch) {
  char* workspace = static_cast<char*>(launch.workspace);
  pack<Compute>(packing, workspace, 0, 1);
  const int warps = emulated_warps;
  for (int t = 0; t < team.teams; ++t) {
    Barrier all(team.members * warps);
    std::vector<std::unique_ptr<Barrier>> barriers;
    std::vector<std::vector<float>> memory;
    std::vector<std::thread> threads;
    for (int i = 0; i < team.members; ++i) {
      barriers.push_back(std::make_unique<Barrier>(warps));
      memory.emplace_back((args.layout.bytes() + 3) / 4, NAN);  // what is never written shows
    }
    for (int i = 0; i < team.members * warps; ++i)
      threads.emplace_back([&, i] {
        const int member = i / warps;
        auto* shared = reinterpret_cast<char*>(memory[member].data());
        EmulatedBlock block{shared, t, member, team.members, i % warps, warps, barriers[member].get(), &all};
        run_block<Compute, MT>(block, args, workspace);
      });
    for (std::thread& thread : threads) thread.join();
  }
  return FD_OK;
}

inline int32_t start_sums(const PartialSums& a, const PartialSums& b, const fd_launch&) {
  sum_parts(a, 0, 1), sum_parts(b, 0, 1);
  return FD_OK;
}
#endif

// A kernel's arguments with all that the host decides, and the memory that it needs.
template <typename Args>
struct Plan {
  Args args{};
  Packing packing{};
  Team team{};
  Workspace workspace;
  int32_t error = FD_OK;
};

// Products and tables get their places in the workspace, behind it the teams' counters.
template <typename Compute, typename Args>
void place_weights(Plan<Args>& plan) {
  constexpr int64_t scalar = sizeof(typename Compute::Scalar);
  Args::each_product(plan.args, [&](Product& p) {
    p.packed = plan.workspace.take(p.weights() * scalar);
    plan.packing.product[plan.packing.products++] = p;
  });
  plan.args.each_table([&](Table& t) {
    t.packed = plan.workspace.take(int64_t{t.inputs} * t.outputs * scalar);
    plan.packing.table[plan.packing.tables++] = t;
  });
}

template <typename T>
T* take(Workspace& workspace, const fd_launch& launch, int64_t count) {
  const auto at = static_cast<uintptr_t>(workspace.take(count * sizeof(T)));
  return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(launch.workspace) + at);
}

// Chooses the team, behind place_weights, and takes memory for its counters. Weights beyond half of
// the cache, of which the multiprocessors share two halves, would come from memory in every step:
// products by a library, over all rows at once, are the better choice then.
template <typename Args, typename TryLayout>
void finish(
    Plan<Args>& plan, const fd_launch& launch, const Device& device, int teams,
    const TryLayout& try_layout) {
  if (plan.workspace.bytes() > device.cache / 2 ||
      !choose_team(device, teams, plan.args.model.units.units(), try_layout, &plan.team))
    plan.error = FD_ERROR_UNSUPPORTED;
  plan.team.arrived = plan.packing.arrived = take<unsigned>(plan.workspace, launch, teams);
  plan.packing.teams = teams;
}

// Says how large the workspace must be, or starts the kernel in it.
template <typename Compute, int MT, typename Args>
int32_t run_plan(const Plan<Args>& plan, fd_launch* launch) {
  if (plan.error) return plan.error;
  if (!launch->workspace) {
    launch->workspace_bytes = plan.workspace.bytes();
    return FD_OK;
  }
  if (launch->workspace_bytes < plan.workspace.bytes() ||
      reinterpret_cast<uintptr_t>(launch->workspace) % 16)
    return FD_ERROR_WORKSPACE;
  return start<Compute, MT>(plan.packing, plan.args, plan.team, *launch);
}

// Of a call whose other arguments are valid; also finds out what the device is.
inline int32_t check_launch(
    const fd_rssm& model, const fd_launch* launch, int64_t rows, int64_t steps, Device* device) {
  if (!launch) return FD_ERROR_NULL_POINTER;
  if (launch->compute != FD_FLOAT32 && launch->compute != FD_BFLOAT16) return FD_ERROR_DTYPE;
  constexpr int64_t kMost = 1 << 20;  // each step counts its barriers, and each 16 rows their team
  if (!fits_indices(model) || rows > kMost || steps > kMost) return FD_ERROR_UNSUPPORTED;
  return current_device(device);
}

inline int32_t nothing_to_run(fd_launch* launch) {
  if (!launch->workspace) launch->workspace_bytes = 0;
  return FD_OK;
}

}  // namespace fastdreamer

#endif
