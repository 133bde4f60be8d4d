// Chunked linear attention, forward: first the states that enter the chunks, document by document, then the outputs.
// phases.h has the two orders in which chunks go through that.
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
  bool walked = false; // gradients of states are kept of the heads of one group, not of all chunks

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
  // Of the gradient of that.
  int64_t state_gradient_at(const Chunk& chunk, int64_t head) const {
    return walked ? head % (heads / groups) * K() * padded(V()) : state_at(chunk, head);
  }
  LinearAttention for_walking() const {
    LinearAttention p = *this;
    p.walked = true;
    return p;
  }
};

// S = decay S + sum_j decay_j k_j v_j^T
class CarryState {
 public:
  CarryState(const LinearAttention& p, int64_t columns)
      : p_(p),
        K_(p.K()),
        wide_K_(padded(p.K())),
        tiles_(kChunk * (wide_K_ + columns)),
        k_(tiles_.take(kChunk * wide_K_)),
        v_(tiles_.take(kChunk * columns)) {}

  void step(const Carried& at) {
    if (!at.wanted)
      return;
    const Chunk& chunk = at.chunk;
    const int64_t h = at.head;
    if (at.next) {
      p_.k.prefetch(*at.next, p_.group(h));
      p_.v.prefetch(*at.next, h);
    }
    const Decays decays(p_.g, chunk, h);
    p_.k.load(chunk, p_.group(h), k_, wide_K_);
    // Zeros first: its padding is scaled with it, and would keep a NaN for the documents that follow.
    std::fill_n(v_, chunk.length * at.columns, 0.f);
    p_.v.load(chunk, h, at.first, at.count, v_, at.columns);
    for (int64_t j = 0; j < chunk.length; ++j) {
      if (p_.step)
        scale_row(v_ + j * at.columns, at.width, p_.step.at(chunk, h, j));
      scale_row(v_ + j * at.columns, at.width, decays.to_end[j]);
    }
    if (decays.any)
      decay_state(at, K_, [&](int64_t) { return decays.whole; });
    const Left keys = Left{k_, wide_K_}.transposed();
    multiply(K_, at.width, chunk.length, keys, v_, at.columns, at.state, at.columns, true);
  }

 private:
  const LinearAttention& p_;
  const int64_t K_, wide_K_;
  Tiles tiles_;
  float *k_, *v_;
};

// Along every document; what enters a chunk is kept, except its document's first.
inline void carry_states(
    const LinearAttention& p, const Chunks& chunks, States initial, States final, float* chunk_states) {
  const auto make = [&](int64_t columns) { return CarryState(p, columns); };
  carry_along_documents(
      p, chunks, false, initial, final, chunk_states, make, [](const Carried& at, auto& state) { state.step(at); });
}

// out_i = scale * (sum_{j <= i} decay_ij (q_i . k_j) v_j + decay_i q_i S), and skip * v.
class ChunkOutputs {
 public:
  ChunkOutputs(const LinearAttention& p, States initial, const float* chunk_states, const Heads& out)
      : p_(p),
        initial_(initial),
        chunk_states_(chunk_states),
        results_(out),
        K_(p.K()),
        V_(p.V()),
        wide_K_(padded(p.K())),
        wide_V_(padded(p.V())),
        tiles_(kChunk * (wide_K_ + K_ + 2 * wide_V_ + 2 * kChunk) + K_ * wide_V_ + 128),
        q_(tiles_.take(kChunk * wide_K_)),
        kt_(tiles_.take(K_ * kChunk)),
        v_(tiles_.take(kChunk * wide_V_)),
        out_(tiles_.take(kChunk * wide_V_)),
        scores_(tiles_.take(kChunk * kChunk)),
        weights_(tiles_.take(kChunk * kChunk)),
        state_(tiles_.take(K_ * wide_V_)) {}

  void prefetch(const Chunk& chunk, int64_t group) const {
    p_.q.prefetch(chunk, group);
    p_.k.prefetch(chunk, group);
  }

  void run(const Chunk& chunk, int64_t group) {
    const int64_t heads = p_.heads / p_.groups, length = chunk.length;
    p_.v.prefetch(chunk, group * heads);
    p_.q.load(chunk, group, q_, wide_K_);
    p_.k.load_transposed(chunk, group, kt_, kChunk);
    multiply_into_triangle(length, K_, Left{q_, wide_K_}, kt_, kChunk, scores_, kChunk);
    for (int64_t h = group * heads; h < (group + 1) * heads; ++h) {
      const Decays decays(p_.g, chunk, h);
      decays.between(weights_);
      for (int64_t i = 0; i < length; ++i)
        for (int64_t j = 0; j <= i; j += kVec) {
          // Selected, not multiplied away: what q_i and a later k_j make of each other may be NaN.
          const Vec weight = Vec::loadu(weights_ + i * kChunk + j), score = Vec::loadu(scores_ + i * kChunk + j);
          Vec::blendv(weight * score * Vec(p_.scale), Vec(0.f), weight == Vec(0.f)).store(weights_ + i * kChunk + j);
        }
      p_.v.load(chunk, h, v_, wide_V_);
      if (h + 1 < (group + 1) * heads)
        p_.v.prefetch(chunk, h + 1);
      if (p_.step)
        for (int64_t j = 0; j < length; ++j)
          scale_row(v_ + j * wide_V_, wide_V_, p_.step.at(chunk, h, j));
      if (chunk.first && !initial_) {
        std::fill(out_, out_ + length * wide_V_, 0.f);
      } else {
        const float* state = chunk_states_ + (chunk.first ? 0 : p_.state_at(chunk, h));
        if (chunk.first) {
          initial_.load(chunk.document, h, K_, 0, V_, state_, wide_V_);
          state = state_;
        }
        multiply(length, wide_V_, K_, Left{q_, wide_K_}, state, wide_V_, out_, wide_V_, false);
        for (int64_t i = 0; i < length; ++i)
          scale_row(out_ + i * wide_V_, wide_V_, p_.scale * decays.from_start[i]);
      }
      multiply_triangle(length, wide_V_, Left{weights_, kChunk}, v_, wide_V_, out_, wide_V_);
      if (p_.skip != nullptr) {
        if (p_.step) // v itself
          p_.v.load(chunk, h, v_, wide_V_);
        for (int64_t i = 0; i < length; ++i)
          for (int64_t d = 0; d < V_; ++d)
            out_[i * wide_V_ + d] += p_.skip[h * V_ + d] * v_[i * wide_V_ + d];
      }
      results_.store(chunk, h, out_, wide_V_);
    }
  }

 private:
  const LinearAttention& p_;
  const States initial_;
  const float* const chunk_states_;
  const Heads& results_;
  const int64_t K_, V_, wide_K_, wide_V_;
  Tiles tiles_;
  float *q_, *kt_, *v_, *out_, *scores_, *weights_, *state_;
};

} // namespace packc
