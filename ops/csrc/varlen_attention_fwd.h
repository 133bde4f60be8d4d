// Attention, forward: a chunk of queries walks along the keys it sees, with the largest score so far subtracted before
// the exponential (online softmax; Milakov and Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135).
#pragma once

#include "attention_dropout.h"
#include "attention_scores.h"
#include "rows.h"
#include "varlen_attention.h"

namespace packc {

class AttentionForward {
 public:
  AttentionForward(
      const Attention& p,
      const Dropout& dropout,
      const Spans& spans,
      const Heads& out,
      float* logsumexp,
      int64_t tokens)
      : p_(p),
        dropout_(dropout),
        spans_(spans),
        out_(out),
        logsumexp_(logsumexp),
        tokens_(tokens),
        wide_K_(padded(p.K())),
        wide_V_(padded(p.V())),
        heads_(p.heads_of_group()),
        tiles_(kChunk * (wide_K_ + wide_V_ + 2 * kChunk + heads_ * (p.K() + wide_V_ + 2)) + 64 * (3 + 4 * heads_)) {
    k_ = tiles_.take(kChunk * wide_K_);
    v_ = tiles_.take(kChunk * wide_V_);
    scores_ = tiles_.take(kChunk * kChunk);
    dropped_ = tiles_.take(kChunk * kChunk);
    for (int64_t h = 0; h < heads_; ++h) {
      OfHead head;
      head.qt = tiles_.take(p.K() * kChunk);
      head.out = tiles_.take(kChunk * wide_V_);
      head.largest = tiles_.take(kChunk);
      head.sum = tiles_.take(kChunk);
      of_heads_.push_back(head);
    }
  }

  // The results of a chunk of queries and the heads of one group, which share k and v.
  void run(int64_t c, int64_t group) {
    const Chunk& queries = spans_.queries.all[c];
    for (int64_t h = 0; h < heads_; ++h) {
      const OfHead& head = of_heads_[h];
      p_.q.load_transposed(queries, group * heads_ + h, head.qt, kChunk);
      std::fill_n(head.out, queries.length * wide_V_, 0.f);
      // A sink is what has been seen before any key.
      for (int64_t i = 0; i < kChunk; ++i)
        head.largest[i] = sink(queries, group * heads_ + h, i) * kLog2e;
      std::fill_n(head.sum, kChunk, p_.sinks ? 1.f : 0.f);
    }
    const Range seen = spans_.chunks_of_keys(p_.seen, c);
    for (int64_t of_keys = seen.begin; of_keys < seen.end; ++of_keys) {
      const Chunk& keys = spans_.keys().all[of_keys];
      const Pair pair(p_.seen, spans_, queries, keys);
      p_.k.load(keys, group, k_, wide_K_);
      p_.v.load(keys, group, v_, wide_V_);
      for (int64_t h = 0; h < heads_; ++h) {
        const OfHead& head = of_heads_[h];
        multiply_seen(pair, p_.K(), Left{k_, wide_K_}, head.qt, scores_);
        if (p_.made())
          make_scores(p_, pair, queries, group * heads_ + h, scores_, nullptr);
        if (dropout_)
          dropout_.factors(pair, spans_, c, of_keys, group * heads_ + h, dropped_);
        weigh(pair, head, of_keys == seen.begin && !p_.sinks);
        add_over_keys(pair, scores_, v_, wide_V_, head.out);
      }
    }
    for (int64_t h = 0; h < heads_; ++h)
      finish(queries, of_heads_[h], group * heads_ + h);
  }

 private:
  struct OfHead {
    float *qt; // (K, 64)
    float *out; // (64, V): sum_j 2^(s_ij - largest_i) v_j, s to base 2
    float *largest, *sum; // (64,): of s_ij, and of the powers
  };

  // Of query i of a chunk.
  float sink(const Chunk& queries, int64_t h, int64_t i) const {
    return p_.sinks && i < queries.length ? p_.sinks.at(queries, h, i) : -kInfinity;
  }

  // Scores become powers of 2, with what was summed so far brought to the same largest score.
  void weigh(const Pair& pair, const OfHead& head, bool first) {
    const Vec factor(p_.made() ? kLog2e : p_.scale * kLog2e), lowest(-kInfinity), zero(0.f);
    const bool all = pair.all();
    for (int64_t i = 0; i < pair.queries; i += kVec) {
      const Range seen = pair.rows(i / kColumns * kColumns, std::min(padded(i + 1), pair.queries));
      const Vec before = Vec::loadu(head.largest + i);
      Vec largest = before;
      for (int64_t j = seen.begin; j < seen.end; ++j) {
        Vec score = Vec::loadu(scores_ + j * kChunk + i) * factor;
        if (!all)
          score = Vec::blendv(score, lowest, pair.hidden(j, i));
        largest = at::vec::maximum(largest, score);
      }
      largest.store(head.largest + i);
      // A column that has seen nothing yet has no largest score, and no weights.
      const Vec reference = Vec::blendv(largest, zero, largest == lowest);
      Vec sum(0.f);
      for (int64_t j = seen.begin; j < seen.end; ++j) {
        float* at = scores_ + j * kChunk + i;
        Vec weight = exp2(at::vec::fmsub(Vec::loadu(at), factor, reference));
        if (!all)
          weight = Vec::blendv(weight, zero, pair.hidden(j, i));
        sum = sum + weight; // before any is dropped
        if (dropout_)
          weight = weight * Vec::loadu(dropped_ + j * kChunk + i);
        weight.store(at);
      }
      if (first) {
        sum.store(head.sum + i);
        continue;
      }
      const Vec kept = Vec::blendv(exp2(before - reference), zero, before == lowest);
      at::vec::fmadd(Vec::loadu(head.sum + i), kept, sum).store(head.sum + i);
      float factors[kVec];
      kept.store(factors);
      for (int64_t lane = 0; lane < std::min(kVec, pair.queries - i); ++lane)
        if (factors[lane] != 1)
          scale_row(head.out + (i + lane) * wide_V_, wide_V_, factors[lane]);
    }
  }

  void finish(const Chunk& queries, const OfHead& head, int64_t h) {
    for (int64_t i = 0; i < queries.length; ++i) {
      if (!spans_.sees_any(p_.seen, queries, i)) {
        std::fill_n(head.out + i * wide_V_, wide_V_, 0.f);
        logsumexp_[h * tokens_ + queries.begin + i] = sink(queries, h, i);
        continue;
      }
      // All scores were -inf: the softmax of that is NaN.
      const float sum = head.largest[i] == -kInfinity ? std::numeric_limits<float>::quiet_NaN() : head.sum[i];
      scale_row(head.out + i * wide_V_, wide_V_, 1 / sum);
      logsumexp_[h * tokens_ + queries.begin + i] = head.largest[i] * kLn2 + std::log(sum);
    }
    out_.store(queries, h, head.out, wide_V_);
  }

  const Attention& p_;
  const Dropout& dropout_;
  const Spans& spans_;
  const Heads& out_;
  float* logsumexp_; // (H, T)
  const int64_t tokens_, wide_K_, wide_V_, heads_;
  Tiles tiles_;
  float *k_, *v_, *scores_, *dropped_;
  std::vector<OfHead> of_heads_;
};

} // namespace packc
