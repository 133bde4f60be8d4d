// Tasks of very different lengths, as documents make them, shared out while they run.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace packc {

// Multiplications that are worth waking a thread: what that takes, and what the thread waits for more afterwards, is
// CPU time, of which small calls had most.
constexpr int64_t kWorthAThread = 1 << 19;

// How many threads so many multiplications are worth.
inline int64_t threads_for(int64_t multiplications) {
  return std::clamp<int64_t>(multiplications / kWorthAThread, 1, at::get_num_threads());
}

// Runs body(task, scratch) for 0 .. tasks on so many threads; whoever is free takes the next `batch`, in order. scratch
// is a thread's own.
template <typename Scratch, typename Body>
void for_each_task(int64_t threads, int64_t tasks, const Scratch& scratch, const Body& body, int64_t batch = 1) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min(threads, at::divup(tasks, batch)), 1, [&](int64_t, int64_t) {
    auto own = scratch();
    for (int64_t first; (first = next.fetch_add(batch)) < tasks;)
      for (int64_t task = first; task < std::min(first + batch, tasks); ++task)
        body(task, own);
  });
}

// Neighbouring tasks share memory pages: as many as still leave every thread something to take at the end.
inline int64_t batch_of(int64_t tasks) {
  return std::clamp<int64_t>(tasks / (8 * at::get_num_threads()), 1, 16);
}

} // namespace packc
