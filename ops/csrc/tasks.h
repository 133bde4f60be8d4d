// Tasks of very different lengths, as documents make them, shared out while they run.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace packc {

// Runs body(task, scratch) for 0 .. tasks on all threads; whoever is free takes the next. scratch is a thread's own.
template <typename Scratch, typename Body>
void for_each_task(int64_t tasks, const Scratch& scratch, const Body& body) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), tasks), 1, [&](int64_t, int64_t) {
    auto own = scratch();
    for (int64_t task; (task = next.fetch_add(1)) < tasks;)
      body(task, own);
  });
}

} // namespace packc
