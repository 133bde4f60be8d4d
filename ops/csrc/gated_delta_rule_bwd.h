// The gated delta rule, backward: the forward's e and what the outputs want of u, of all chunks at once; then the
// gradients of u and of the states, from the last chunk of a document to its first; then all chunks' gradients at once.
//
// With dS the gradient of the state S' that leaves a chunk, l_j that of u_j, through later tokens' errors too, and x^T
// that of pairs:
//
//     du_j = sum_{i >= j} scale (q_i . k_j) do_i + dS^T (to_end_j k_j)
//     l    = du + R^T beta du,   dv_i = beta_i l_i,   dbeta_i = l_i^T e_i
//     d(q_i . k_j) = scale do_i^T u_j,   d(k_i . k_j) = -dv_i^T u_j
//     dS   = whole dS + sum_i (scale from_start_i q_i) do_i^T - (from_start_i k_i) dv_i^T
//
// The gradient of g_t is what decays over token t: in pairs j < t <= i, from the entering state to i >= t, from j < t
// to the leaving state, and from the one state to the other; each is the product of something with its own gradient.
#pragma once

#include "gated_delta_rule.h"

namespace packc {

template <typename Gate>
struct GatedDeltaRuleGradients {
  Heads dq, dk, dv;
  typename Gate::Gradient dg;
  PerHead dbeta;
};

// Of tokens, between the phases.
struct Workspace {
  float* resolvents; // (64, 64) of a chunk and head
  float* errors; // e, (64, V); or null, where nobody wants them
  float* du; // (64, V); l in the end
};

template <typename Gate>
void recompute_errors(
    const GatedDeltaRule& p,
    const Chunks& chunks,
    const at::Tensor& g,
    const Heads& dout,
    States initial,
    const float* chunk_states,
    Workspace w) {
  const int64_t K = p.K(), V = p.V(), wide_K = padded(K), wide_V = padded(V), heads = p.heads / p.groups;
  struct Scratch {
    Gate gate;
    Tiles tiles;
    float *q, *k, *kt, *decayed, *pairs, *state, *left, *dout;
    Scratch(const at::Tensor& g, int64_t K, int64_t wide_K, int64_t wide_V)
        : gate(g, K),
          tiles(kChunk * (3 * wide_K + kChunk + 2 * wide_V) + K * (kApart + wide_V) + 128),
          q(tiles.take(kChunk * wide_K)),
          k(tiles.take(kChunk * wide_K)),
          kt(tiles.take(K * kApart)),
          decayed(tiles.take(kChunk * wide_K)),
          pairs(tiles.take(kChunk * kChunk)),
          state(tiles.take(K * wide_V)),
          left(tiles.take(kChunk * wide_V)),
          dout(tiles.take(kChunk * wide_V)) {}
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
    s.gate.key_products(chunk, s.k, s.kt);
    s.gate.query_products(chunk, s.q, s.kt);
    for (int64_t h = group * heads; h < (group + 1) * heads; ++h) {
      const int64_t at = p.tile_at(chunk, h, wide_V);
      float *resolvent = w.resolvents + p.tile_at(chunk, h, kChunk), *du = w.du + at;
      p.v.prefetch(chunk, h);
      dout.prefetch(chunk, h);
      s.gate.head_with_pairs(chunk, h);
      s.gate.key_pairs(s.k, s.k, s.pairs);
      resolve(p, chunk, h, s.pairs, resolvent);
      if (w.errors != nullptr) {
        float* e = w.errors + at;
        // Zeros first: a tile's padding takes part in what follows.
        std::fill_n(e, length * wide_V, 0.f);
        p.v.load(chunk, h, e, wide_V);
        if (const float* state = entering_state(p, chunk, h, initial, chunk_states, s.state)) {
          s.gate.from_start(s.k, -1, s.decayed);
          multiply(length, wide_V, K, Left{s.decayed, wide_K}, state, wide_V, e, wide_V, true);
        }
        scale_by_beta(p, chunk, h, 1, e, wide_V, wide_V, s.left, wide_V);
        multiply_triangle(length, wide_V, Left{resolvent, kChunk}, s.left, wide_V, e, wide_V);
      }

      s.gate.query_pairs(s.q, s.k, s.pairs);
      dout.load(chunk, h, s.dout, wide_V);
      std::fill_n(du, length * wide_V, 0.f);
      multiply_triangle_transposed(length, wide_V, Left{s.pairs, kChunk}, s.dout, wide_V, du, wide_V);
    }
  };
  for_each_task(tasks, scratch, body, batch_of(tasks));
}

// What leaves a chunk is kept where the state is that enters the next.
template <typename Gate>
void correct_state_gradients(
    const GatedDeltaRule& p,
    const Chunks& chunks,
    const at::Tensor& g,
    const Heads& dout,
    States dfinal,
    States dinitial,
    Workspace w,
    float* dstates) {
  const int64_t K = p.K(), wide_K = padded(K), wide_V = padded(p.V());
  struct Scratch {
    Gate gate;
    Tiles tiles;
    float *x, *decayed, *dout, *scaled;
    Scratch(const at::Tensor& g, int64_t K, int64_t wide_K, int64_t columns)
        : gate(g, K),
          tiles(2 * kChunk * (wide_K + columns)),
          x(tiles.take(kChunk * wide_K)),
          decayed(tiles.take(kChunk * wide_K)),
          dout(tiles.take(kChunk * columns)),
          scaled(tiles.take(kChunk * columns)) {}
  };
  const auto make = [&](int64_t columns) { return Scratch(g, K, wide_K, columns); };
  carry_along_documents(p, chunks, true, dfinal, dinitial, dstates, make, [&](const Carried& at, Scratch& s) {
    const Chunk& chunk = at.chunk;
    const int64_t h = at.head, columns = at.columns, width = at.width, length = chunk.length;
    if (at.next) {
      p.k.prefetch(*at.next, p.group(h));
      p.q.prefetch(*at.next, p.group(h));
      dout.prefetch(*at.next, h);
    }
    s.gate.head(chunk, h);
    float* du = w.du + p.tile_at(chunk, h, wide_V) + at.first;
    p.k.load(chunk, p.group(h), s.x, wide_K);
    if (!at.zero) {
      s.gate.to_end(s.x, s.decayed);
      multiply(length, width, K, Left{s.decayed, wide_K}, at.state, columns, du, wide_V, true);
    }
    scale_by_beta(p, chunk, h, 1, du, wide_V, width, s.scaled, columns);
    const Left resolvent{w.resolvents + p.tile_at(chunk, h, kChunk), kChunk};
    multiply_triangle_transposed(length, width, resolvent, s.scaled, columns, du, wide_V);
    if (!at.wanted)
      return;
    decay_state(at, K, [&](int64_t i) { return s.gate.whole(i); });
    scale_by_beta(p, chunk, h, 1, du, wide_V, width, s.scaled, columns);
    s.gate.from_start(s.x, -1, s.decayed);
    multiply(K, width, length, Left{s.decayed, wide_K}.transposed(), s.scaled, columns, at.state, columns, true);
    p.q.load(chunk, p.group(h), s.x, wide_K);
    dout.load(chunk, h, at.first, at.count, s.dout, columns);
    s.gate.from_start(s.x, p.scale, s.decayed);
    multiply(K, width, length, Left{s.decayed, wide_K}.transposed(), s.dout, columns, at.state, columns, true);
  });
}

} // namespace packc
