// What a kernel runs on: the threads of a block, the blocks of a team, and their barriers. On a GPU
// these are the chip's; on the host (EmulatedBlock) a std::thread stands for each warp, and the
// lanes of a warp are a loop, so that the same kernels run, and race, on a CPU.
#ifndef FASTDREAMER_CUDA_BLOCK_H
#define FASTDREAMER_CUDA_BLOCK_H

#include <stdint.h>

#ifdef __CUDACC__
#define FD_FN __device__ __forceinline__
#define FD_BOTH __host__ __device__ inline
#define FD_EITHER _Pragma("nv_exec_check_disable")  // calls what is for one of both
#else
#include <condition_variable>
#include <mutex>
#define FD_FN inline
#define FD_BOTH inline
#define FD_EITHER
#endif

namespace fastdreamer {

constexpr int kWarp = 32, kThreads = 256;

// A value of each lane of a warp: one here on a GPU, all of them on the host.
template <typename T>
struct Lanes {
#ifdef __CUDA_ARCH__
  T value[1];
#else
  T value[kWarp];
#endif
};

// Calls body(lane, its place in Lanes) for the calling lane; on the host for every lane.
template <typename Body>
FD_FN void by_lane(const Body& body) {
#ifdef __CUDA_ARCH__
  body(static_cast<int>(threadIdx.x % kWarp), 0);
#else
  for (int lane = 0; lane < kWarp; ++lane) body(lane, lane);
#endif
}

// Folds the values of a warp's lanes by an associative operation; every lane gets the result.
template <typename T, typename Fold>
FD_FN T warp_fold(const Lanes<T>& x, const Fold& fold) {
#ifdef __CUDA_ARCH__
  T result = x.value[0];
#pragma unroll
  for (int far = kWarp / 2; far > 0; far /= 2) result = fold(result, result.from_lane(far));
  return result;
#else
  T result = x.value[0];
  for (int lane = 1; lane < kWarp; ++lane) result = fold(result, x.value[lane]);
  return result;
#endif
}

struct Sum {
  float value;
#ifdef __CUDACC__
  __device__ Sum from_lane(int far) const { return {__shfl_xor_sync(~0u, value, far)}; }
#endif
};

FD_FN float warp_sum(const Lanes<Sum>& x) {
  return warp_fold(x, [](Sum a, Sum b) { return Sum{a.value + b.value}; }).value;
}
FD_FN float warp_max(const Lanes<Sum>& x) {
  return warp_fold(x, [](Sum a, Sum b) { return Sum{a.value > b.value ? a.value : b.value}; }).value;
}

// The blocks that go through the steps together.
enum TeamKind { kTeamOfOne, kTeamCluster, kTeamGrid };

struct Team {
  int kind, teams, members;
  unsigned* arrived;  // (teams,) in global memory, 0 before the kernel; kTeamGrid only
};

#ifdef __CUDACC__
struct GpuBlock {
  char* shared;
  int team, member, members, kind;
  unsigned* arrived;
  unsigned expected;

  __device__ GpuBlock(const Team& t, char* memory)
      : shared(memory), team(blockIdx.x / t.members), member(blockIdx.x % t.members),
        members(t.members), kind(t.kind), arrived(t.arrived + team), expected(0) {}

  __device__ int thread() const { return threadIdx.x; }
  __device__ int threads() const { return kThreads; }
  __device__ int warp() const { return threadIdx.x / kWarp; }
  __device__ int warps() const { return kThreads / kWarp; }
  __device__ void sync() const { __syncthreads(); }

  // What any thread of the team wrote before is seen by all of them after.
  __device__ void team_sync() {
    if (kind == kTeamOfOne) {
      __syncthreads();
    } else if (kind == kTeamCluster) {
#if __CUDA_ARCH__ >= 900
      __cluster_barrier_arrive();
      __cluster_barrier_wait();
#endif
    } else {
      __syncthreads();
      expected += members;
      if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(arrived, 1u);
        unsigned seen;
        do asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(seen) : "l"(arrived) : "memory");
        while (static_cast<int>(seen - expected) < 0);
        __threadfence();
      }
      __syncthreads();
    }
  }
};
#else
class Barrier {
 public:
  explicit Barrier(int count) : count_(count) {}
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const unsigned round = round_;
    if (++waiting_ == count_) {
      waiting_ = 0;
      ++round_;
      all_here_.notify_all();
    } else {
      all_here_.wait(lock, [&] { return round != round_; });
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable all_here_;
  int count_, waiting_ = 0;
  unsigned round_ = 0;
};

struct EmulatedBlock {
  char* shared;
  int team, member, members, index, count;  // index: of this warp, of `count`
  Barrier *block_barrier, *team_barrier;

  int thread() const { return index; }
  int threads() const { return count; }
  int warp() const { return index; }
  int warps() const { return count; }
  void sync() const { block_barrier->wait(); }
  void team_sync() const { team_barrier->wait(); }
};
#endif

}  // namespace fastdreamer

#endif
