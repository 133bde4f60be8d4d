// The gated delta rule, forward: first what needs no state, of all chunks at once; then the states that enter the
// chunks and the corrections u, document by document; then all chunks' outputs at once.
#pragma once

#include "gated_delta_rule.h"

namespace packc {

// The matrices R of all chunks.
template <typename Gate>
void resolve_chunks(const GatedDeltaRule& p, const Chunks& chunks, const at::Tensor& g, float* resolvents) {
  const int64_t K = p.K(), wide_K = padded(K), heads = p.heads / p.groups;
  struct Scratch {
    Gate gate;
    Tiles tiles;
    float *k, *kt, *pairs;
    Scratch(const at::Tensor& g, int64_t K, int64_t wide_K)
        : gate(g, K),
          tiles(kChunk * (wide_K + kChunk) + K * kApart + 64),
          k(tiles.take(kChunk * wide_K)),
          kt(tiles.take(K * kApart)),
          pairs(tiles.take(kChunk * kChunk)) {}
  };
  const int64_t tasks = static_cast<int64_t>(chunks.all.size()) * p.groups;
  const auto scratch = [&] { return Scratch(g, K, wide_K); };
  const auto body = [&](int64_t task, Scratch& s) {
    const Chunk& chunk = chunks.all[task / p.groups];
    const int64_t group = task % p.groups;
    if (task + 1 < tasks)
      p.k.prefetch(chunks.all[(task + 1) / p.groups], (task + 1) % p.groups);
    p.k.load(chunk, group, s.k, wide_K);
    transpose(s.k, chunk.length, K, wide_K, s.kt);
    s.gate.key_products(chunk, s.k, s.kt);
    for (int64_t h = group * heads; h < (group + 1) * heads; ++h) {
      s.gate.head_with_pairs(chunk, h);
      s.gate.key_pairs(s.k, s.k, s.pairs);
      resolve(p, chunk, h, s.pairs, resolvents + p.tile_at(chunk, h, kChunk));
    }
  };
  for_each_task(tasks, scratch, body, batch_of(tasks));
}

// u, and S' = whole S + sum_j to_end_j k_j u_j^T along every document; u and what enters a chunk are kept, except its
// document's first, unless there is no place for them.
template <typename Gate>
void correct_states(
    const GatedDeltaRule& p,
    const Chunks& chunks,
    const at::Tensor& g,
    States initial,
    States final,
    const float* resolvents,
    float* chunk_states,
    float* corrections) {
  const int64_t K = p.K(), wide_K = padded(K), wide_V = padded(p.V());
  struct Scratch {
    Gate gate;
    Tiles tiles;
    float *k, *decayed, *left, *error;
    Scratch(const at::Tensor& g, int64_t K, int64_t wide_K, int64_t columns)
        : gate(g, K),
          tiles(2 * kChunk * (wide_K + columns)),
          k(tiles.take(kChunk * wide_K)),
          decayed(tiles.take(kChunk * wide_K)),
          left(tiles.take(kChunk * columns)),
          error(tiles.take(kChunk * columns)) {}
  };
  const auto make = [&](int64_t columns) { return Scratch(g, K, wide_K, columns); };
  carry_along_documents(p, chunks, false, initial, final, chunk_states, make, [&](const Carried& at, Scratch& s) {
    if (p.no_values && is_zero(at, K)) // and stays so
      return;
    const Chunk& chunk = at.chunk;
    const int64_t h = at.head, columns = at.columns, width = at.width;
    if (at.next) {
      p.k.prefetch(*at.next, p.group(h));
      p.v.prefetch(*at.next, h);
    }
    s.gate.head(chunk, h);
    p.k.load(chunk, p.group(h), s.k, wide_K);
    // Zeros first: a tile's padding takes part in what follows.
    std::fill_n(s.error, chunk.length * columns, 0.f);
    p.v.load(chunk, h, at.first, at.count, s.error, columns);
    if (!at.zero) {
      s.gate.from_start(s.k, -1, s.decayed);
      multiply(chunk.length, width, K, Left{s.decayed, wide_K}, at.state, columns, s.error, columns, true);
    }
    scale_by_beta(p, chunk, h, 1, s.error, columns, width, s.left, columns);
    const Left resolvent{resolvents + p.tile_at(chunk, h, kChunk), kChunk};
    multiply_triangle(chunk.length, width, resolvent, s.left, columns, s.error, columns);
    const bool kept = corrections != nullptr;
    float* u = kept ? corrections + p.tile_at(chunk, h, wide_V) + at.first : s.left;
    const int64_t u_row = kept ? wide_V : columns;
    scale_by_beta(p, chunk, h, 1, s.error, columns, width, u, u_row);
    if (!at.wanted)
      return;
    s.gate.to_end(s.k, s.decayed);
    decay_state(at, K, [&](int64_t i) { return s.gate.whole(i); });
    multiply(K, width, chunk.length, Left{s.decayed, wide_K}.transposed(), u, u_row, at.state, columns, true);
  });
}

// o_i = scale (S^T (from_start_i q_i) + sum_{j <= i} (q_i . k_j) u_j)
template <typename Gate>
void correct_outputs(
    const GatedDeltaRule& p,
    const Chunks& chunks,
    const at::Tensor& g,
    States initial,
    const float* chunk_states,
    const float* corrections,
    const Heads& out) {
  const int64_t K = p.K(), V = p.V(), wide_K = padded(K), wide_V = padded(V), heads = p.heads / p.groups;
  struct Scratch {
    Gate gate;
    Tiles tiles;
    float *q, *k, *kt, *decayed, *pairs, *state, *out;
    Scratch(const at::Tensor& g, int64_t K, int64_t wide_K, int64_t wide_V)
        : gate(g, K),
          tiles(kChunk * (3 * wide_K + kChunk + wide_V) + K * (kApart + wide_V) + 128),
          q(tiles.take(kChunk * wide_K)),
          k(tiles.take(kChunk * wide_K)),
          kt(tiles.take(K * kApart)),
          decayed(tiles.take(kChunk * wide_K)),
          pairs(tiles.take(kChunk * kChunk)),
          state(tiles.take(K * wide_V)),
          out(tiles.take(kChunk * wide_V)) {}
  };
  const auto scratch = [&] { return Scratch(g, K, wide_K, wide_V); };
  const int64_t tasks = static_cast<int64_t>(chunks.all.size()) * p.groups;
  const auto body = [&](int64_t task, Scratch& s) {
    const Chunk& chunk = chunks.all[task / p.groups];
    const int64_t group = task % p.groups, length = chunk.length;
    if (task + 1 < tasks) {
      const Chunk& next = chunks.all[(task + 1) / p.groups];
      p.q.prefetch(next, (task + 1) % p.groups);
      p.k.prefetch(next, (task + 1) % p.groups);
    }
    p.q.load(chunk, group, s.q, wide_K);
    p.k.load(chunk, group, s.k, wide_K);
    transpose(s.k, chunk.length, K, wide_K, s.kt);
    scale_row(s.q, length * wide_K, p.scale);
    s.gate.query_products(chunk, s.q, s.kt);
    for (int64_t h = group * heads; h < (group + 1) * heads; ++h) {
      s.gate.head_with_pairs(chunk, h);
      s.gate.query_pairs(s.q, s.k, s.pairs);
      const float* state = entering_state(p, chunk, h, initial, chunk_states, s.state);
      if (state == nullptr) {
        std::fill_n(s.out, length * wide_V, 0.f);
      } else {
        s.gate.from_start(s.q, 1, s.decayed);
        multiply(length, wide_V, K, Left{s.decayed, wide_K}, state, wide_V, s.out, wide_V, false);
      }
      const float* u = corrections + p.tile_at(chunk, h, wide_V);
      multiply_triangle(length, wide_V, Left{s.pairs, kChunk}, u, wide_V, s.out, wide_V);
      out.store(chunk, h, s.out, wide_V);
    }
  };
  for_each_task(tasks, scratch, body, batch_of(tasks));
}

} // namespace packc
