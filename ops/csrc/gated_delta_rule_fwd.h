// The gated delta rule, forward: first what needs no state; then the states that enter the chunks and the corrections u,
// document by document; then the outputs. phases.h has the two orders in which chunks go through that.
#pragma once

#include "gated_delta_rule.h"

namespace packc {

// The matrices R of a chunk.
template <typename Gate>
class ResolveChunk {
 public:
  ResolveChunk(const GatedDeltaRule& p, const at::Tensor& g, float* resolvents)
      : p_(p),
        resolvents_(resolvents),
        K_(p.K()),
        wide_K_(padded(p.K())),
        gate_(g, p.K()),
        tiles_(kChunk * (wide_K_ + kChunk) + K_ * kApart + 64),
        k_(tiles_.take(kChunk * wide_K_)),
        kt_(tiles_.take(K_ * kApart)),
        pairs_(tiles_.take(kChunk * kChunk)) {}

  void prefetch(const Chunk& chunk, int64_t group) const {
    p_.k.prefetch(chunk, group);
  }

  void run(const Chunk& chunk, int64_t group) {
    const int64_t heads = p_.heads / p_.groups;
    p_.k.load(chunk, group, k_, wide_K_);
    transpose(k_, chunk.length, K_, wide_K_, kt_);
    gate_.key_products(chunk, k_, kt_);
    for (int64_t h = group * heads; h < (group + 1) * heads; ++h) {
      gate_.head_with_pairs(chunk, h);
      gate_.key_pairs(k_, k_, pairs_);
      resolve(p_, chunk, h, pairs_, resolvents_ + p_.tile_at(chunk, h, kChunk));
    }
  }

 private:
  const GatedDeltaRule& p_;
  float* const resolvents_;
  const int64_t K_, wide_K_;
  Gate gate_;
  Tiles tiles_;
  float *k_, *kt_, *pairs_;
};

// u, and S' = whole S + sum_j to_end_j k_j u_j^T; u is kept, unless there is no place for it.
template <typename Gate>
class CorrectState {
 public:
  CorrectState(
      const GatedDeltaRule& p, const at::Tensor& g, const float* resolvents, float* corrections, int64_t columns)
      : p_(p),
        resolvents_(resolvents),
        corrections_(corrections),
        K_(p.K()),
        wide_K_(padded(p.K())),
        gate_(g, p.K()),
        tiles_(2 * kChunk * (wide_K_ + columns)),
        k_(tiles_.take(kChunk * wide_K_)),
        decayed_(tiles_.take(kChunk * wide_K_)),
        left_(tiles_.take(kChunk * columns)),
        error_(tiles_.take(kChunk * columns)) {}

  void step(const Carried& at) {
    if (p_.no_values && is_zero(at, K_)) // and stays so
      return;
    const Chunk& chunk = at.chunk;
    const int64_t h = at.head, columns = at.columns, width = at.width;
    if (at.next) {
      p_.k.prefetch(*at.next, p_.group(h));
      p_.v.prefetch(*at.next, h);
    }
    gate_.head(chunk, h);
    p_.k.load(chunk, p_.group(h), k_, wide_K_);
    // Zeros first: a tile's padding takes part in what follows.
    std::fill_n(error_, chunk.length * columns, 0.f);
    p_.v.load(chunk, h, at.first, at.count, error_, columns);
    if (!at.zero) {
      gate_.from_start(k_, -1, decayed_);
      multiply(chunk.length, width, K_, Left{decayed_, wide_K_}, at.state, columns, error_, columns, true);
    }
    scale_by_beta(p_, chunk, h, 1, error_, columns, width, left_, columns);
    const Left resolvent{resolvents_ + p_.tile_at(chunk, h, kChunk), kChunk};
    multiply_triangle(chunk.length, width, resolvent, left_, columns, error_, columns);
    const bool kept = corrections_ != nullptr;
    const int64_t wide_V = padded(p_.V()), u_row = kept ? wide_V : columns;
    float* u = kept ? corrections_ + p_.tile_at(chunk, h, wide_V) + at.first : left_;
    scale_by_beta(p_, chunk, h, 1, error_, columns, width, u, u_row);
    if (!at.wanted)
      return;
    gate_.to_end(k_, decayed_);
    decay_state(at, K_, [&](int64_t i) { return gate_.whole(i); });
    multiply(K_, width, chunk.length, Left{decayed_, wide_K_}.transposed(), u, u_row, at.state, columns, true);
  }

 private:
  const GatedDeltaRule& p_;
  const float* const resolvents_;
  float* const corrections_;
  const int64_t K_, wide_K_;
  Gate gate_;
  Tiles tiles_;
  float *k_, *decayed_, *left_, *error_;
};

// o_i = scale (S^T (from_start_i q_i) + sum_{j <= i} (q_i . k_j) u_j)
template <typename Gate>
class CorrectOutputs {
 public:
  CorrectOutputs(
      const GatedDeltaRule& p,
      const at::Tensor& g,
      States initial,
      const float* chunk_states,
      const float* corrections,
      const Heads& out)
      : p_(p),
        initial_(initial),
        chunk_states_(chunk_states),
        corrections_(corrections),
        results_(out),
        K_(p.K()),
        wide_K_(padded(p.K())),
        wide_V_(padded(p.V())),
        gate_(g, p.K()),
        tiles_(kChunk * (3 * wide_K_ + kChunk + wide_V_) + K_ * (kApart + wide_V_) + 128),
        q_(tiles_.take(kChunk * wide_K_)),
        k_(tiles_.take(kChunk * wide_K_)),
        kt_(tiles_.take(K_ * kApart)),
        decayed_(tiles_.take(kChunk * wide_K_)),
        pairs_(tiles_.take(kChunk * kChunk)),
        state_(tiles_.take(K_ * wide_V_)),
        out_(tiles_.take(kChunk * wide_V_)) {}

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
    gate_.query_products(chunk, q_, kt_);
    for (int64_t h = group * heads; h < (group + 1) * heads; ++h) {
      gate_.head_with_pairs(chunk, h);
      gate_.query_pairs(q_, k_, pairs_);
      const float* state = entering_state(p_, chunk, h, initial_, chunk_states_, state_);
      if (state == nullptr) {
        std::fill_n(out_, length * wide_V_, 0.f);
      } else {
        gate_.from_start(q_, 1, decayed_);
        multiply(length, wide_V_, K_, Left{decayed_, wide_K_}, state, wide_V_, out_, wide_V_, false);
      }
      const float* u = corrections_ + p_.tile_at(chunk, h, wide_V_);
      multiply_triangle(length, wide_V_, Left{pairs_, kChunk}, u, wide_V_, out_, wide_V_);
      results_.store(chunk, h, out_, wide_V_);
    }
  }

 private:
  const GatedDeltaRule& p_;
  const States initial_;
  const float *chunk_states_, *corrections_;
  const Heads& results_;
  const int64_t K_, wide_K_, wide_V_;
  Gate gate_;
  Tiles tiles_;
  float *q_, *k_, *kt_, *decayed_, *pairs_, *state_, *out_;
};

} // namespace packc
