// The gated delta rule, backward: the forward's e and what the outputs want of u; then the gradients of u and of the
// states, from the last chunk of a document to its first; then all other gradients. phases.h has the two orders.
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
class RecomputeErrors {
 public:
  RecomputeErrors(
      const GatedDeltaRule& p,
      const at::Tensor& g,
      const Heads& dout,
      States initial,
      const float* chunk_states,
      Workspace w)
      : p_(p),
        douts_(dout),
        initial_(initial),
        chunk_states_(chunk_states),
        w_(w),
        K_(p.K()),
        wide_K_(padded(p.K())),
        wide_V_(padded(p.V())),
        gate_(g, p.K()),
        tiles_(kChunk * (3 * wide_K_ + kChunk + 2 * wide_V_) + K_ * (kApart + wide_V_) + 128),
        q_(tiles_.take(kChunk * wide_K_)),
        k_(tiles_.take(kChunk * wide_K_)),
        kt_(tiles_.take(K_ * kApart)),
        decayed_(tiles_.take(kChunk * wide_K_)),
        pairs_(tiles_.take(kChunk * kChunk)),
        state_(tiles_.take(K_ * wide_V_)),
        left_(tiles_.take(kChunk * wide_V_)),
        dout_(tiles_.take(kChunk * wide_V_)) {}

  void prefetch(const Chunk& chunk, int64_t group) const {
    p_.q.prefetch(chunk, group);
    p_.k.prefetch(chunk, group);
  }

  void run(const Chunk& chunk, int64_t group) {
    const int64_t heads = p_.heads / p_.groups, length = chunk.length;
    p_.q.load(chunk, group, q_, wide_K_);
    p_.k.load(chunk, group, k_, wide_K_);
    transpose(k_, length, K_, wide_K_, kt_);
    scale_row(q_, length * wide_K_, p_.scale);
    gate_.key_products(chunk, k_, kt_);
    gate_.query_products(chunk, q_, kt_);
    for (int64_t h = group * heads; h < (group + 1) * heads; ++h) {
      const int64_t at = p_.tile_at(chunk, h, wide_V_);
      float *resolvent = w_.resolvents + p_.tile_at(chunk, h, kChunk), *du = w_.du + at;
      p_.v.prefetch(chunk, h);
      douts_.prefetch(chunk, h);
      gate_.head_with_pairs(chunk, h);
      gate_.key_pairs(k_, k_, pairs_);
      resolve(p_, chunk, h, pairs_, resolvent);
      if (w_.errors != nullptr) {
        float* e = w_.errors + at;
        // Zeros first: a tile's padding takes part in what follows.
        std::fill_n(e, length * wide_V_, 0.f);
        p_.v.load(chunk, h, e, wide_V_);
        if (const float* state = entering_state(p_, chunk, h, initial_, chunk_states_, state_)) {
          gate_.from_start(k_, -1, decayed_);
          multiply(length, wide_V_, K_, Left{decayed_, wide_K_}, state, wide_V_, e, wide_V_, true);
        }
        scale_by_beta(p_, chunk, h, 1, e, wide_V_, wide_V_, left_, wide_V_);
        multiply_triangle(length, wide_V_, Left{resolvent, kChunk}, left_, wide_V_, e, wide_V_);
      }

      gate_.query_pairs(q_, k_, pairs_);
      douts_.load(chunk, h, dout_, wide_V_);
      std::fill_n(du, length * wide_V_, 0.f);
      multiply_triangle_transposed(length, wide_V_, Left{pairs_, kChunk}, dout_, wide_V_, du, wide_V_);
    }
  }

 private:
  const GatedDeltaRule& p_;
  const Heads& douts_;
  const States initial_;
  const float* const chunk_states_;
  const Workspace w_;
  const int64_t K_, wide_K_, wide_V_;
  Gate gate_;
  Tiles tiles_;
  float *q_, *k_, *kt_, *decayed_, *pairs_, *state_, *left_, *dout_;
};

// l, in the place of du, and dS.
template <typename Gate>
class CorrectStateGradient {
 public:
  CorrectStateGradient(
      const GatedDeltaRule& p, const at::Tensor& g, const Heads& dout, Workspace w, int64_t columns)
      : p_(p),
        douts_(dout),
        w_(w),
        K_(p.K()),
        wide_K_(padded(p.K())),
        gate_(g, p.K()),
        tiles_(2 * kChunk * (wide_K_ + columns)),
        x_(tiles_.take(kChunk * wide_K_)),
        decayed_(tiles_.take(kChunk * wide_K_)),
        dout_(tiles_.take(kChunk * columns)),
        scaled_(tiles_.take(kChunk * columns)) {}

  void step(const Carried& at) {
    const Chunk& chunk = at.chunk;
    const int64_t h = at.head, columns = at.columns, width = at.width, length = chunk.length;
    if (at.next) {
      p_.k.prefetch(*at.next, p_.group(h));
      p_.q.prefetch(*at.next, p_.group(h));
      douts_.prefetch(*at.next, h);
    }
    gate_.head(chunk, h);
    const int64_t wide_V = padded(p_.V());
    float* du = w_.du + p_.tile_at(chunk, h, wide_V) + at.first;
    p_.k.load(chunk, p_.group(h), x_, wide_K_);
    if (!at.zero) {
      gate_.to_end(x_, decayed_);
      multiply(length, width, K_, Left{decayed_, wide_K_}, at.state, columns, du, wide_V, true);
    }
    scale_by_beta(p_, chunk, h, 1, du, wide_V, width, scaled_, columns);
    const Left resolvent{w_.resolvents + p_.tile_at(chunk, h, kChunk), kChunk};
    multiply_triangle_transposed(length, width, resolvent, scaled_, columns, du, wide_V);
    if (!at.wanted)
      return;
    decay_state(at, K_, [&](int64_t i) { return gate_.whole(i); });
    scale_by_beta(p_, chunk, h, 1, du, wide_V, width, scaled_, columns);
    gate_.from_start(x_, -1, decayed_);
    multiply(K_, width, length, Left{decayed_, wide_K_}.transposed(), scaled_, columns, at.state, columns, true);
    p_.q.load(chunk, p_.group(h), x_, wide_K_);
    douts_.load(chunk, h, at.first, at.count, dout_, columns);
    gate_.from_start(x_, p_.scale, decayed_);
    multiply(K_, width, length, Left{decayed_, wide_K_}.transposed(), dout_, columns, at.state, columns, true);
  }

 private:
  const GatedDeltaRule& p_;
  const Heads& douts_;
  const Workspace w_;
  const int64_t K_, wide_K_;
  Gate gate_;
  Tiles tiles_;
  float *x_, *decayed_, *dout_, *scaled_;
};

} // namespace packc
