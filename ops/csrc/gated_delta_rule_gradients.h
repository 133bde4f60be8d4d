// The gated delta rule, backward: the gradients of a chunk, from those of its corrections and of the states around it.
#pragma once

#include "gated_delta_rule_bwd.h"

namespace packc {

template <typename Gate>
class GatedDeltaRuleChunk {
 public:
  GatedDeltaRuleChunk(
      const GatedDeltaRule& p,
      const GatedDeltaRuleGradients<Gate>& gradients,
      const at::Tensor& g,
      const Heads& dout,
      States initial,
      States dfinal,
      const float* chunk_states,
      const float* dstates,
      Workspace w)
      : p_(p),
        gradients_(gradients),
        dout_(dout),
        initial_(initial),
        dfinal_(dfinal),
        chunk_states_(chunk_states),
        dstates_(dstates),
        w_(w),
        K_(p.K()),
        V_(p.V()),
        wide_K_(padded(p.K())),
        wide_V_(padded(p.V())),
        gate_(g, p.K()),
        tiles_(
            kChunk * (8 * wide_K_ + 3 * wide_V_ + 2 * kChunk) + 2 * K_ * wide_V_ + V_ * (kApart + apart(K_)) +
            2 * wide_K_ + 512) {
    for (float** tile : {&q_, &k_, &dq_, &dk_, &dg_, &of_query_, &of_reader_, &of_key_})
      *tile = tiles_.take(kChunk * wide_K_);
    for (float** tile : {&do_, &dv_, &u_})
      *tile = tiles_.take(kChunk * wide_V_);
    for (float** tile : {&queries_, &readers_})
      *tile = tiles_.take(kChunk * kChunk);
    ut_ = tiles_.take(V_ * kApart);
    for (float** tile : {&own_state_, &own_dstate_})
      *tile = tiles_.take(K_ * wide_V_);
    transposed_ = tiles_.take(V_ * apart(K_));
    through_ = tiles_.take(wide_K_);
    sums_ = tiles_.take(wide_K_);
  }

  void prefetch(const Chunk& chunk, int64_t group) const {
    p_.q.prefetch(chunk, group);
    p_.k.prefetch(chunk, group);
  }

  // All gradients of a chunk and its heads of one group, which share q and k.
  void run(const Chunk& chunk, int64_t group) {
    const int64_t heads = p_.heads / p_.groups, floats = chunk.length * wide_K_;
    p_.q.load(chunk, group, q_, wide_K_);
    p_.k.load(chunk, group, k_, wide_K_);
    scale_row(q_, floats, p_.scale);
    std::fill_n(dq_, floats, 0.f);
    std::fill_n(dk_, floats, 0.f);
    for (int64_t h = group * heads; h < (group + 1) * heads; ++h)
      head(chunk, h);
    scale_row(dq_, floats, p_.scale);
    gradients_.dq.store(chunk, group, dq_, wide_K_);
    gradients_.dk.store(chunk, group, dk_, wide_K_);
  }

 private:
  void head(const Chunk& chunk, int64_t h) {
    const int64_t at = p_.tile_at(chunk, h, wide_V_);
    length_ = chunk.length;
    dout_.prefetch(chunk, h);
    gate_.head_with_pairs(chunk, h);
    const float *e = w_.errors + at, *l = w_.du + at;
    for (int64_t i = 0; i < length_; ++i)
      gradients_.dbeta.at(chunk, h, i) = dot_row(l + i * wide_V_, e + i * wide_V_, wide_V_);
    scale_by_beta(p_, chunk, h, 1, l, wide_V_, wide_V_, dv_, wide_V_);
    scale_by_beta(p_, chunk, h, 1, e, wide_V_, wide_V_, u_, wide_V_);
    gradients_.dv.store(chunk, h, dv_, wide_V_);
    dout_.load(chunk, h, do_, wide_V_);

    const float* state = entering_state(p_, chunk, h, initial_, chunk_states_, own_state_);
    const float* dstate = leaving(chunk, h);
    for (int64_t channel = 0; channel < K_; ++channel) {
      const int64_t row = channel * wide_V_;
      const bool there = state != nullptr && dstate != nullptr;
      through_[channel] = there ? gate_.whole(channel) * dot_row(state + row, dstate + row, wide_V_) : 0;
    }
    from_leaving_state(dstate);
    from_entering_state(state);
    from_pairs();
    finish();
    gate_.store(gradients_.dg, chunk, h, dg_);
  }

  // Into dk, and into dg of the tokens behind: dS (to_end_j u_j).
  void from_leaving_state(const float* dstate) {
    if (dstate == nullptr) {
      std::fill_n(dg_, length_ * wide_K_, 0.f);
      return;
    }
    read_transposed(dstate, u_, of_key_);
    gate_.to_end(of_key_, of_key_);
    std::fill_n(sums_, wide_K_, 0.f);
    for (int64_t t = 0; t < length_; ++t)
      for (int64_t c = 0; c < wide_K_; c += kVec) {
        const int64_t at = t * wide_K_ + c;
        const Vec sum = Vec::loadu(sums_ + c), key = Vec::loadu(of_key_ + at);
        sum.store(dg_ + at);
        at::vec::fmadd(Vec::loadu(k_ + at), key, sum).store(sums_ + c);
        (Vec::loadu(dk_ + at) + key).store(dk_ + at);
      }
  }

  // The gradients of queries, and of keys that read: from_start_i (S do_i) and -from_start_i (S dv_i).
  void from_entering_state(const float* state) {
    if (state == nullptr) {
      std::fill_n(of_query_, length_ * wide_K_, 0.f);
      std::fill_n(of_reader_, length_ * wide_K_, 0.f);
      return;
    }
    read_transposed(state, do_, of_query_);
    multiply(length_, wide_K_, V_, Left{dv_, wide_V_}, transposed_, apart(K_), of_reader_, wide_K_, false);
    gate_.from_start(of_query_, 1, of_query_);
    gate_.from_start(of_reader_, -1, of_reader_);
  }

  void from_pairs() {
    transpose(u_, length_, V_, wide_V_, ut_);
    multiply_into_triangle(length_, V_, Left{do_, wide_V_}, ut_, kApart, queries_, kChunk);
    multiply_into_triangle(length_, V_, Left{dv_, wide_V_}, ut_, kApart, readers_, kChunk);
    for (int64_t i = 0; i < length_; ++i) {
      const int64_t end = (i / kColumns + 1) * kColumns;
      float *query = queries_ + i * kChunk, *reader = readers_ + i * kChunk;
      // No decay lies between a token and itself.
      add_row(dq_ + i * wide_K_, k_ + i * wide_K_, wide_K_, query[i]);
      add_row(dk_ + i * wide_K_, q_ + i * wide_K_, wide_K_, query[i]);
      for (int64_t j = 0; j < i; ++j)
        reader[j] = -reader[j];
      std::fill(query + i, query + end, 0.f);
      std::fill(reader + i, reader + end, 0.f);
    }
    gate_.pull(q_, k_, queries_, readers_, of_query_, of_reader_, of_key_);
  }

  void finish() {
    std::copy_n(through_, wide_K_, sums_);
    for (int64_t t = length_ - 1; t >= 0; --t)
      for (int64_t c = 0; c < wide_K_; c += kVec) {
        const int64_t at = t * wide_K_ + c;
        const Vec query = Vec::loadu(of_query_ + at), reader = Vec::loadu(of_reader_ + at);
        const Vec key = Vec::loadu(of_key_ + at);
        const Vec owed = Vec::loadu(q_ + at) * query + Vec::loadu(k_ + at) * (reader - key);
        const Vec sum = Vec::loadu(sums_ + c) + owed;
        sum.store(sums_ + c);
        (Vec::loadu(dg_ + at) + sum).store(dg_ + at);
        (Vec::loadu(dq_ + at) + query).store(dq_ + at);
        (Vec::loadu(dk_ + at) + reader + key).store(dk_ + at);
      }
  }

  // out_i = state x_i
  void read_transposed(const float* state, const float* x, float* out) {
    load_tile(Block<const float>{state, 1, wide_V_}, V_, K_, transposed_, apart(K_));
    multiply(length_, wide_K_, V_, Left{x, wide_V_}, transposed_, apart(K_), out, wide_K_, false);
  }

  // The gradient of the state that leaves a chunk; null where that is zero.
  const float* leaving(const Chunk& chunk, int64_t h) {
    if (!chunk.last)
      return dstates_ + p_.state_gradient_at((&chunk)[1], h);
    if (!dfinal_)
      return nullptr;
    dfinal_.load(chunk.document, h, K_, 0, V_, own_dstate_, wide_V_);
    return own_dstate_;
  }

  const GatedDeltaRule& p_;
  const GatedDeltaRuleGradients<Gate>& gradients_;
  const Heads& dout_;
  const States initial_, dfinal_;
  const float *chunk_states_, *dstates_;
  const Workspace w_;
  const int64_t K_, V_, wide_K_, wide_V_;
  int64_t length_ = 0;
  Gate gate_;
  Tiles tiles_;
  float *q_, *k_, *dq_, *dk_, *dg_; // (64, K); q_ and what follows from it with scale
  float *of_query_, *of_reader_, *of_key_; // (64, K): gradients of q_i; of k_i that reads a state, and that writes one
  float *do_, *dv_, *u_; // (64, V)
  float *queries_, *readers_; // (64, 64): gradients of q_i . k_j and k_i . k_j
  float* ut_; // (V, 64)
  float *own_state_, *own_dstate_; // (K, V)
  float* transposed_; // (V, K)
  float *through_, *sums_; // (K,)
};

} // namespace packc
