// Work on several threads, on PyTorch's own pool where the caller lends it: a second pool would
// spin against the first.
#ifndef FASTDREAMER_CPU_PARALLEL_H
#define FASTDREAMER_CPU_PARALLEL_H

#include <stdint.h>

namespace fastdreamer {

// Threads that parallel_tasks uses.
int64_t thread_count();

// Calls task(context, i) for i in 0 .. count - 1, each once, in any order and on any thread.
void parallel_tasks(int64_t count, void (*task)(void*, int64_t), void* context);

// The same with a callable.
template <typename Body>
void parallel_for(int64_t count, const Body& body) {
  parallel_tasks(
      count, [](void* context, int64_t i) { (*static_cast<const Body*>(context))(i); },
      const_cast<Body*>(&body));
}

// Splits 0 .. size - 1 into contiguous ranges, at most one for each thread and none shorter than
// `grain` but the last, and calls body(begin, end) for each.
template <typename Body>
void parallel_ranges(int64_t size, int64_t grain, const Body& body) {
  if (size <= 0) return;
  const int64_t limit = (size + grain - 1) / grain;
  const int64_t parts = limit < thread_count() ? limit : thread_count();
  const int64_t step = (size + parts - 1) / parts;
  parallel_for(parts, [&](int64_t i) {
    const int64_t end = (i + 1) * step < size ? (i + 1) * step : size;
    if (i * step < end) body(i * step, end);
  });
}

}  // namespace fastdreamer

#endif
