// Runs tasks by GOMP_parallel, the entry of every OpenMP runtime that GCC's code can call.
#include "parallel.h"

#include <atomic>

#include "fastdreamer.h"

namespace fastdreamer {
namespace {

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

Parallel gomp_parallel = nullptr;
int64_t threads = 1;

struct Job {
  int64_t count;
  void (*task)(void*, int64_t);
  void* context;
  std::atomic<int64_t> next;
};

void run(void* data) {
  Job& job = *static_cast<Job*>(data);
  for (int64_t i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < job.count;)
    job.task(job.context, i);
}

}  // namespace

int64_t thread_count() { return gomp_parallel ? threads : 1; }

void parallel_tasks(int64_t count, void (*task)(void*, int64_t), void* context) {
  Job job{count, task, context, {0}};
  const int64_t team = count < thread_count() ? count : thread_count();
  if (team > 1)
    gomp_parallel(run, &job, static_cast<unsigned>(team), 0);
  else
    run(&job);
}

}  // namespace fastdreamer

int32_t fd_set_threads(void* gomp_parallel, int64_t threads) {
  if (threads < 1) return FD_ERROR_SIZE;
  fastdreamer::gomp_parallel = reinterpret_cast<fastdreamer::Parallel>(gomp_parallel);
  fastdreamer::threads = threads;
  return FD_OK;
}
