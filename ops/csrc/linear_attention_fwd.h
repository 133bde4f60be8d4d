// Chunked linear attention, forward: first the states that enter the chunks, document by document, then all chunks'
// outputs at once.
#pragma once

#include "chunks.h"
#include "gemm.h"
#include "rows.h"
#include "states.h"

namespace packc {

struct LinearAttention {
  Heads q, k; // (B, L, G, K)
  Heads v; // (B, L, H, V)
  PerHead g; // (B, L, H), log decay
  PerHead step; // (B, L, H), a factor of v
  const float* skip; // (H, V), of v in out; or null
  float scale;
  int64_t heads, groups, slots; // slots: chunk states of a row

  int64_t K() const {
    return q.channels;
  }
  int64_t V() const {
    return v.channels;
  }
  int64_t group(int64_t head) const {
    return head / (heads / groups);
  }
  // Of the (K, padded V) state that enters a chunk.
  int64_t state_at(const Chunk& chunk, int64_t head) const {
    return (chunk.slot(slots) * heads + head) * K() * padded(V());
  }
};

// S = decay S + sum_j decay_j k_j v_j^T along every document; what enters a chunk is kept, except its document's first.
inline void carry_states(
    const LinearAttention& p, const Chunks& chunks, States initial, States final, float* chunk_states) {
  const int64_t K = p.K(), wide_K = padded(K);
  struct Scratch {
    Tiles tiles;
    float *k, *v;
    Scratch(int64_t wide_K, int64_t columns)
        : tiles(kChunk * (wide_K + columns)), k(tiles.take(kChunk * wide_K)), v(tiles.take(kChunk * columns)) {}
  };
  const auto make = [&](int64_t columns) { return Scratch(wide_K, columns); };
  carry_along_documents(p, chunks, false, initial, final, chunk_states, make, [&](const Carried& at, Scratch& s) {
    if (!at.wanted)
      return;
    const Chunk& chunk = at.chunk;
    const int64_t h = at.head;
    if (at.next) {
      p.k.prefetch(*at.next, p.group(h));
      p.v.prefetch(*at.next, h);
    }
    const Decays decays(p.g, chunk, h);
    p.k.load(chunk, p.group(h), s.k, wide_K);
    // Zeros first: its padding is scaled with it, and would keep a NaN for the documents that follow.
    std::fill_n(s.v, chunk.length * at.columns, 0.f);
    p.v.load(chunk, h, at.first, at.count, s.v, at.columns);
    for (int64_t j = 0; j < chunk.length; ++j) {
      if (p.step)
        scale_row(s.v + j * at.columns, at.width, p.step.at(chunk, h, j));
      scale_row(s.v + j * at.columns, at.width, decays.to_end[j]);
    }
    if (decays.any)
      decay_state(at, K, [&](int64_t) { return decays.whole; });
    const Left keys = Left{s.k, wide_K}.transposed();
    multiply(K, at.width, chunk.length, keys, s.v, at.columns, at.state, at.columns, true);
  });
}

// out_i = scale * (sum_{j <= i} decay_ij (q_i . k_j) v_j + decay_i q_i S), and skip * v.
inline void chunk_outputs(
    const LinearAttention& p, const Chunks& chunks, States initial, const float* chunk_states, const Heads& out) {
  const int64_t K = p.K(), V = p.V(), wide_K = padded(K), wide_V = padded(V);
  struct Scratch {
    Tiles tiles;
    float *q, *kt, *v, *out, *scores, *weights, *state;
    Scratch(int64_t K, int64_t wide_K, int64_t wide_V)
        : tiles(kChunk * (wide_K + K + 2 * wide_V + 2 * kChunk) + K * wide_V + 128),
          q(tiles.take(kChunk * wide_K)),
          kt(tiles.take(K * kChunk)),
          v(tiles.take(kChunk * wide_V)),
          out(tiles.take(kChunk * wide_V)),
          scores(tiles.take(kChunk * kChunk)),
          weights(tiles.take(kChunk * kChunk)),
          state(tiles.take(K * wide_V)) {}
  };
  const int64_t tasks = static_cast<int64_t>(chunks.all.size()) * p.groups;
  const auto scratch = [&] { return Scratch(K, wide_K, wide_V); };
  for_each_task(threads_for_states(p, chunks), tasks, scratch, [&](int64_t task, Scratch& s) {
    const Chunk& chunk = chunks.all[task / p.groups];
    const int64_t group = task % p.groups, heads = p.heads / p.groups, length = chunk.length;
    if (task + 1 < tasks) {
      const Chunk& next = chunks.all[(task + 1) / p.groups];
      p.q.prefetch(next, (task + 1) % p.groups);
      p.k.prefetch(next, (task + 1) % p.groups);
    }
    p.v.prefetch(chunk, group * heads);
    p.q.load(chunk, group, s.q, wide_K);
    p.k.load_transposed(chunk, group, s.kt, kChunk);
    multiply_into_triangle(length, K, Left{s.q, wide_K}, s.kt, kChunk, s.scores, kChunk);
    for (int64_t h = group * heads; h < (group + 1) * heads; ++h) {
      const Decays decays(p.g, chunk, h);
      decays.between(s.weights);
      for (int64_t i = 0; i < length; ++i)
        for (int64_t j = 0; j <= i; j += kVec) {
          // Selected, not multiplied away: what q_i and a later k_j make of each other may be NaN.
          const Vec weight = Vec::loadu(s.weights + i * kChunk + j), score = Vec::loadu(s.scores + i * kChunk + j);
          Vec::blendv(weight * score * Vec(p.scale), Vec(0.f), weight == Vec(0.f)).store(s.weights + i * kChunk + j);
        }
      p.v.load(chunk, h, s.v, wide_V);
      if (h + 1 < (group + 1) * heads)
        p.v.prefetch(chunk, h + 1);
      if (p.step)
        for (int64_t j = 0; j < length; ++j)
          scale_row(s.v + j * wide_V, wide_V, p.step.at(chunk, h, j));
      if (chunk.first && !initial) {
        std::fill(s.out, s.out + length * wide_V, 0.f);
      } else {
        const float* state = chunk_states + (chunk.first ? 0 : p.state_at(chunk, h));
        if (chunk.first) {
          initial.load(chunk.document, h, K, 0, V, s.state, wide_V);
          state = s.state;
        }
        multiply(length, wide_V, K, Left{s.q, wide_K}, state, wide_V, s.out, wide_V, false);
        for (int64_t i = 0; i < length; ++i)
          scale_row(s.out + i * wide_V, wide_V, p.scale * decays.from_start[i]);
      }
      multiply_triangle(length, wide_V, Left{s.weights, kChunk}, s.v, wide_V, s.out, wide_V);
      if (p.skip != nullptr) {
        if (p.step) // v itself
          p.v.load(chunk, h, s.v, wide_V);
        for (int64_t i = 0; i < length; ++i)
          for (int64_t d = 0; d < V; ++d)
            s.out[i * wide_V + d] += p.skip[h * V + d] * s.v[i * wide_V + d];
      }
      out.store(chunk, h, s.out, wide_V);
    }
  }, batch_of(tasks));
}

} // namespace packc
