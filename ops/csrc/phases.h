// The two orders in which the chunks of a mixer go through its phases. The first phase needs no state, the second carries
// states along documents, the third needs the states around a chunk. Results are the same, bit for bit.
//
// A phase after the other, all chunks share out among threads: for documents that are few. A document and group after
// the other, each chunk goes through all phases while what they hand on, and the tokens that all of them read, are in a
// core's cache.
#pragma once

#include "states.h"

namespace packc {

// Whether documents and groups alone keep all threads busy to the end.
template <typename Problem>
inline bool worth_walking(const Problem& p, const Chunks& chunks) {
  const int64_t threads = threads_for_states(p, chunks);
  int64_t longest = 0;
  for (size_t n = 0; n + 1 < chunks.of.size(); ++n)
    longest = std::max(longest, chunks.of[n + 1] - chunks.of[n]);
  return threads == 1 || 2 * longest * threads <= static_cast<int64_t>(chunks.all.size()) * p.groups;
}

// One phase of all chunks and groups: make() makes what a thread works with.
template <typename Problem, typename Make>
void for_each_chunk(const Problem& p, const Chunks& chunks, const Make& make) {
  const int64_t tasks = static_cast<int64_t>(chunks.all.size()) * p.groups;
  for_each_task(threads_for_states(p, chunks), tasks, make, [&](int64_t task, auto& phase) {
    if (task + 1 < tasks)
      phase.prefetch(chunks.all[(task + 1) / p.groups], (task + 1) % p.groups);
    phase.run(chunks.all[task / p.groups], task % p.groups);
  }, batch_of(tasks));
}

// All phases of one chunk after the other, forwards or `backwards`. Of what make() makes, before(chunk, group) and
// after(chunk, group) are the first phase and the third, step(carried) is the second, and kept(chunk, head) the place
// for the state between a chunk and the one before it.
template <typename Problem, typename Make>
void walk_documents(
    const Problem& p, const Chunks& chunks, bool backwards, States from, States to, const Make& make) {
  const int64_t K = p.K(), V = p.V(), wide_V = padded(V), size = K * wide_V, heads = p.heads / p.groups;
  const int64_t documents = static_cast<int64_t>(chunks.of.size()) - 1;
  struct Own {
    Tiles tiles;
    float* states;
    decltype(make()) phases;
    Own(int64_t floats, const Make& make) : tiles(floats), states(tiles.take(floats)), phases(make()) {}
  };
  const auto own = [&] { return Own(heads * size, make); };
  for_each_task(threads_for_states(p, chunks), documents * p.groups, own, [&](int64_t task, Own& own) {
    const int64_t n = task / p.groups, group = task % p.groups, length = chunks.of[n + 1] - chunks.of[n];
    std::fill_n(own.states, heads * size, 0.f);
    if (from)
      for (int64_t i = 0; i < heads; ++i)
        from.load(n, group * heads + i, K, 0, V, own.states + i * size, wide_V);
    for (int64_t c = 0; c < length; ++c) {
      const Chunk* chunk = &chunks.all[backwards ? chunks.of[n + 1] - 1 - c : chunks.of[n] + c];
      const Chunk* next = c + 1 == length ? nullptr : chunk + (backwards ? -1 : 1);
      own.phases.before(*chunk, group);
      for (int64_t i = 0; i < heads; ++i) {
        const int64_t h = group * heads + i;
        float* state = own.states + i * size;
        if (c > 0)
          std::copy_n(state, size, own.phases.kept(backwards ? chunk[1] : *chunk, h));
        own.phases.step(Carried{*chunk, next, h, 0, V, wide_V, wide_V, state, c == 0 && !from, next != nullptr || to});
      }
      own.phases.after(*chunk, group);
    }
    if (to)
      for (int64_t i = 0; i < heads; ++i)
        to.store(n, group * heads + i, K, 0, V, own.states + i * size, wide_V);
  });
}

} // namespace packc
