// Chunked linear attention, backward: the gradients of the states between chunks, from the last chunk of a document to
// its first, then all other gradients. phases.h has the two orders.
//
// With P_ij = scale decay_ij for j <= i, dS the gradient of the state S' that leaves a chunk and S the one that enters:
//
//     dq_i = sum_j P_ij (do_i . v_j) k_j + scale from_start_i S do_i
//     dk_j = sum_i P_ij (do_i . v_j) q_i + to_end_j dS v_j
//     dv_j = sum_i P_ij (q_i . k_j) do_i + to_end_j dS^T k_j
//     dg_t = sum_{j < t <= i} P_ij (q_i . k_j) (do_i . v_j) + sum_{i >= t} do_i . (what S gives o_i)
//          + sum_{j < t} dS . (what token j gives S') + dS . (what S gives S')
#pragma once

#include "linear_attention_fwd.h"

namespace packc {

struct LinearAttentionGradients {
  Heads dq, dk, dv;
  PerHead dg, dstep; // or none
  float* dskip; // (chunks, H, padded V) partial sums, or null
};

// dS = decay dS + scale sum_i decay_i q_i do_i^T
class CarryStateGradient {
 public:
  CarryStateGradient(const LinearAttention& p, const Heads& dout, int64_t columns)
      : p_(p),
        douts_(dout),
        K_(p.K()),
        wide_K_(padded(p.K())),
        tiles_(kChunk * (wide_K_ + columns)),
        q_(tiles_.take(kChunk * wide_K_)),
        dout_(tiles_.take(kChunk * columns)) {}

  void step(const Carried& at) {
    if (!at.wanted)
      return;
    const Chunk& chunk = at.chunk;
    const int64_t h = at.head;
    if (at.next) {
      p_.q.prefetch(*at.next, p_.group(h));
      douts_.prefetch(*at.next, h);
    }
    const Decays decays(p_.g, chunk, h);
    p_.q.load(chunk, p_.group(h), q_, wide_K_);
    std::fill_n(dout_, chunk.length * at.columns, 0.f); // as the forward's v
    douts_.load(chunk, h, at.first, at.count, dout_, at.columns);
    for (int64_t i = 0; i < chunk.length; ++i)
      scale_row(dout_ + i * at.columns, at.width, p_.scale * decays.from_start[i]);
    if (decays.any)
      decay_state(at, K_, [&](int64_t) { return decays.whole; });
    const Left queries = Left{q_, wide_K_}.transposed();
    multiply(K_, at.width, chunk.length, queries, dout_, at.columns, at.state, at.columns, true);
  }

 private:
  const LinearAttention& p_;
  const Heads& douts_;
  const int64_t K_, wide_K_;
  Tiles tiles_;
  float *q_, *dout_;
};

// Along every document; what leaves a chunk is kept where the state is that enters the next.
inline void carry_state_gradients(
    const LinearAttention& p, const Heads& dout, const Chunks& chunks, States dfinal, States dinitial, float* dstates) {
  const auto make = [&](int64_t columns) { return CarryStateGradient(p, dout, columns); };
  carry_along_documents(
      p, chunks, true, dfinal, dinitial, dstates, make, [](const Carried& at, auto& state) { state.step(at); });
}

inline void transpose(const float* x, int64_t rows, int64_t columns, int64_t width, float* out, int64_t out_width) {
  load_tile(Block<const float>{x, 1, width}, columns, rows, out, out_width);
}

class ChunkBackward {
 public:
  ChunkBackward(
      const LinearAttention& p,
      const LinearAttentionGradients& gradients,
      const Heads& dout,
      const Chunks& chunks,
      States initial,
      States dfinal,
      const float* chunk_states,
      const float* dstates)
      : p_(p),
        gradients_(gradients),
        dout_(dout),
        chunks_(chunks),
        initial_(initial),
        dfinal_(dfinal),
        chunk_states_(chunk_states),
        dstates_(dstates),
        K_(p.K()),
        V_(p.V()),
        wide_K_(padded(p.K())),
        wide_V_(padded(p.V())),
        tiles_(kChunk * (4 * wide_K_ + 4 * wide_V_ + 5 * kChunk + 5 * K_ + 2 * V_) + 2 * K_ * wide_V_ + 512) {
    for (float** tile : {&q_, &k_, &dq_, &dk_})
      *tile = tiles_.take(kChunk * wide_K_);
    for (float** tile : {&raw_v_, &v_, &do_, &dv_})
      *tile = tiles_.take(kChunk * wide_V_);
    for (float** tile : {&scores_, &dscores_, &group_dscores_, &decays_, &weights_})
      *tile = tiles_.take(kChunk * kChunk);
    for (float** tile : {&qt_, &kt_, &dqt_, &dkt_, &carried_})
      *tile = tiles_.take(K_ * kChunk);
    for (float** tile : {&vt_, &dot_})
      *tile = tiles_.take(V_ * kChunk);
    for (float** tile : {&own_state_, &own_dstate_})
      *tile = tiles_.take(K_ * wide_V_);
  }

  void prefetch(const Chunk& chunk, int64_t group) const {
    p_.q.prefetch(chunk, group);
    p_.k.prefetch(chunk, group);
  }

  // All gradients of a chunk and its heads of one group, which share q and k: what the heads make of pairs of tokens is
  // summed before it meets k and q.
  void run(const Chunk& chunk, int64_t group) {
    const int64_t c = &chunk - chunks_.all.data();
    const int64_t heads = p_.heads / p_.groups;
    p_.v.prefetch(chunk, group * heads);
    dout_.prefetch(chunk, group * heads);
    p_.q.load(chunk, group, q_, wide_K_);
    p_.k.load(chunk, group, k_, wide_K_);
    transpose(q_, chunk.length, K_, wide_K_, qt_, kChunk);
    transpose(k_, chunk.length, K_, wide_K_, kt_, kChunk);
    multiply_into_triangle(chunk.length, K_, Left{q_, wide_K_}, kt_, kChunk, scores_, kChunk);
    std::fill_n(group_dscores_, chunk.length * kChunk, 0.f);
    std::fill_n(dqt_, K_ * kChunk, 0.f);
    std::fill_n(dkt_, K_ * kChunk, 0.f);
    for (int64_t h = group * heads; h < (group + 1) * heads; ++h)
      head(c, h);
    transpose(dqt_, K_, chunk.length, kChunk, dq_, wide_K_);
    transpose(dkt_, K_, chunk.length, kChunk, dk_, wide_K_);
    multiply_triangle(chunk.length, wide_K_, Left{group_dscores_, kChunk}, k_, wide_K_, dq_, wide_K_);
    multiply_triangle_transposed(chunk.length, wide_K_, Left{group_dscores_, kChunk}, q_, wide_K_, dk_, wide_K_);
    gradients_.dq.store(chunk, group, dq_, wide_K_);
    gradients_.dk.store(chunk, group, dk_, wide_K_);
  }

 private:
  void head(int64_t c, int64_t h) {
    const Chunk& chunk = chunks_.all[c];
    const int64_t length = chunk.length;
    const Decays decays(p_.g, chunk, h);
    p_.v.load(chunk, h, raw_v_, wide_V_);
    std::copy_n(raw_v_, length * wide_V_, v_);
    if (p_.step)
      for (int64_t j = 0; j < length; ++j)
        scale_row(v_ + j * wide_V_, wide_V_, p_.step.at(chunk, h, j));
    transpose(v_, length, V_, wide_V_, vt_, kChunk);
    dout_.load(chunk, h, do_, wide_V_);
    if ((h + 1) % (p_.heads / p_.groups) != 0) {
      p_.v.prefetch(chunk, h + 1);
      dout_.prefetch(chunk, h + 1);
    }
    multiply_into_triangle(length, V_, Left{do_, wide_V_}, vt_, kChunk, dscores_, kChunk);

    float of_entering[kChunk] = {}, to_leaving[kChunk] = {};
    double in_row[kChunk] = {}, in_column[kChunk] = {};
    weigh(decays, in_row, in_column);
    float through = 0;
    const float* state = entering(chunk, h);
    const float* dstate = leaving(c, h);
    if (state != nullptr && dstate != nullptr && gradients_.dg)
      through = decays.whole * dot_row(state, dstate, K_ * wide_V_);

    // dv, then what follows from it.
    if (dstate == nullptr) {
      std::fill(dv_, dv_ + length * wide_V_, 0.f);
    } else {
      multiply(length, wide_V_, K_, Left{k_, wide_K_}, dstate, wide_V_, dv_, wide_V_, false);
      for (int64_t j = 0; j < length; ++j)
        scale_row(dv_ + j * wide_V_, wide_V_, decays.to_end[j]);
    }
    multiply_triangle_transposed(length, wide_V_, Left{weights_, kChunk}, do_, wide_V_, dv_, wide_V_);
    finish_dv(c, h);

    // dq and dk, what states have in them.
    if (state != nullptr) {
      transpose(do_, length, V_, wide_V_, dot_, kChunk);
      carry(length, decays.from_start, p_.scale, dot_, state, qt_, dqt_, of_entering);
    }
    if (dstate != nullptr)
      carry(length, decays.to_end, 1, vt_, dstate, kt_, dkt_, to_leaving);

    if (gradients_.dg) {
      // Sums from either side, never a whole less a part: strong decays make the parts as small as they like.
      // In double: what rows and columns have in common cancels, all the more in a sum over tokens.
      double before[kChunk] = {}, within = 0;
      for (int64_t t = 1; t < length; ++t)
        before[t] = before[t - 1] + to_leaving[t - 1];
      for (int64_t t = length - 1; t >= 0; --t) {
        within += in_row[t] - in_column[t] + of_entering[t];
        gradients_.dg.at(chunk, h, t) = static_cast<float>(within + before[t] + through);
      }
    }
  }

  // From q k^T and do v^T: P q k^T in weights_, P do v^T added to the group's, and sums of what each pair owes to its
  // decay.
  void weigh(const Decays& decays, double* in_row, double* in_column) {
    decays.between(decays_);
    const Vec zero(0.f), scale(p_.scale);
    float column[kChunk] = {}, column_rest[kChunk] = {};
    for (int64_t i = 0; i < decays.length; ++i) {
      Vec of_row = zero, of_row_rest = zero;
      // As far as the products read.
      for (int64_t j = 0; j < (i / kColumns + 1) * kColumns; j += kVec) {
        const int64_t at = i * kChunk + j;
        const Vec decay = Vec::loadu(decays_ + at), outside = decay == zero;
        const Vec score = Vec::blendv(Vec::loadu(scores_ + at), zero, outside);
        const Vec dscore = Vec::blendv(decay * scale * Vec::loadu(dscores_ + at), zero, outside);
        (decay * scale * score).store(weights_ + at);
        (Vec::loadu(group_dscores_ + at) + dscore).store(group_dscores_ + at);
        // A token owes nothing to a decay of itself: left to cancel, the diagonal would leave its rounding errors.
        Vec owed = dscore * score;
        if (j <= i && i < j + kVec) {
          float pairs[kVec];
          owed.store(pairs);
          pairs[i - j] = 0;
          owed = Vec::loadu(pairs);
        }
        add(owed, of_row, of_row_rest);
        Vec of_column = Vec::loadu(column + j), of_column_rest = Vec::loadu(column_rest + j);
        add(owed, of_column, of_column_rest);
        of_column.store(column + j);
        of_column_rest.store(column_rest + j);
      }
      float sums[kVec], rests[kVec];
      of_row.store(sums);
      of_row_rest.store(rests);
      for (int64_t lane = 0; lane < kVec; ++lane)
        in_row[i] += static_cast<double>(sums[lane]) + rests[lane];
    }
    for (int64_t j = 0; j < decays.length; ++j)
      in_column[j] = static_cast<double>(column[j]) + column_rest[j];
  }

  // sum += x, what rounding takes away kept in rest (Knuth's two-sum).
  static void add(const Vec& x, Vec& sum, Vec& rest) {
    const Vec before = sum;
    sum = before + x;
    const Vec added = sum - before;
    rest = rest + ((before - (sum - added)) + (x - added));
  }

  // From the gradient of step * v in dv_.
  void finish_dv(int64_t c, int64_t h) {
    const Chunk& chunk = chunks_.all[c];
    if (p_.step)
      for (int64_t j = 0; j < chunk.length; ++j) {
        float* row = dv_ + j * wide_V_;
        gradients_.dstep.at(chunk, h, j) = dot_row(row, raw_v_ + j * wide_V_, wide_V_);
        scale_row(row, wide_V_, p_.step.at(chunk, h, j));
      }
    if (p_.skip != nullptr) {
      float* sums = gradients_.dskip + (c * p_.heads + h) * wide_V_;
      for (int64_t j = 0; j < chunk.length; ++j)
        for (int64_t d = 0; d < V_; ++d) {
          dv_[j * wide_V_ + d] += p_.skip[h * V_ + d] * do_[j * wide_V_ + d];
          sums[d] += raw_v_[j * wide_V_ + d] * do_[j * wide_V_ + d];
        }
    }
    gradients_.dv.store(chunk, h, dv_, wide_V_);
  }

  // Of tokens in columns: into_i += factor decay_i (state x_i); sums_i: of what is added, its product with other_i.
  void carry(
      int64_t length,
      const float* decay,
      float factor,
      const float* x,
      const float* state,
      const float* other,
      float* into,
      float* sums) {
    multiply(K_, padded(length), V_, Left{state, wide_V_}, x, kChunk, carried_, kChunk, false);
    for (int64_t i = 0; i < length; i += kVec) {
      const Vec factors = Vec(factor) * Vec::loadu(decay + i);
      Vec sum(0.f);
      for (int64_t k = 0; k < K_; ++k) {
        const int64_t at = k * kChunk + i;
        const Vec added = factors * Vec::loadu(carried_ + at);
        (Vec::loadu(into + at) + added).store(into + at);
        sum = at::vec::fmadd(added, Vec::loadu(other + at), sum);
      }
      sum.store(sums + i);
    }
  }

  // The state that enters a chunk, with rows of padded V; null where that is zero.
  const float* entering(const Chunk& chunk, int64_t h) {
    if (!chunk.first)
      return chunk_states_ + p_.state_at(chunk, h);
    if (!initial_)
      return nullptr;
    initial_.load(chunk.document, h, K_, 0, V_, own_state_, wide_V_);
    return own_state_;
  }

  // The gradient of the state that leaves a chunk; null where that is zero.
  const float* leaving(int64_t c, int64_t h) {
    const Chunk& chunk = chunks_.all[c];
    if (!chunk.last)
      return dstates_ + p_.state_gradient_at(chunks_.all[c + 1], h);
    if (!dfinal_)
      return nullptr;
    dfinal_.load(chunk.document, h, K_, 0, V_, own_dstate_, wide_V_);
    return own_dstate_;
  }

  const LinearAttention& p_;
  const LinearAttentionGradients& gradients_;
  const Heads& dout_;
  const Chunks& chunks_;
  const States initial_, dfinal_;
  const float *chunk_states_, *dstates_;
  const int64_t K_, V_, wide_K_, wide_V_;
  Tiles tiles_;
  float *q_, *k_, *dq_, *dk_; // (64, K)
  float *qt_, *kt_, *dqt_, *dkt_, *carried_; // (K, 64)
  float *raw_v_, *v_, *do_, *dv_; // (64, V); v_ is step * v
  float *vt_, *dot_; // (V, 64)
  float *scores_, *dscores_, *group_dscores_, *decays_, *weights_; // (64, 64)
  float *own_state_, *own_dstate_; // (K, V)
};

} // namespace packc
