// Attention, backward: with the weights p_ij found again from the scores and their logsumexp, and do_i . o_i = D_i,
//
//     dp_ij = do_i . v_j,   ds_ij = scale p_ij (dp_ij - D_i)
//     dv_j = sum_i p_ij do_i,   dk_j = sum_i ds_ij q_i,   dq_i = sum_j ds_ij k_j
//
// Dropout's factors go into dp_ij, and into p_ij in dv_j: D_i stays what it is. A sink's share gives dsink = - sum_i
// exp(sink - lse_i) D_i; there D_i is sum_j p_ij dp_ij, for o_i is rounded to its dtype, and nothing averages that out.
//
// A span and the heads of one group are a task: what the queries of a head, in order, give to a key is summed, then
// that of the heads. So it is where every head is a task of its own, for want of others: no bit depends on which it was.
#pragma once

#include <ATen/ops/empty.h>

#include "attention_dropout.h"
#include "attention_scores.h"
#include "rows.h"
#include "varlen_attention.h"

namespace packc {

class AttentionBackward {
 public:
  struct Tensors {
    Heads dout, out; // (1, T, H, V)
    const float* logsumexp; // (H, T)
    Heads dq;
    Heads dk, dv; // (1, T, G, .) or (1, T, H, .)
    std::optional<Heads> dbias; // (1, T, H, R)
    PerHead dsinks; // (1, T, H): of each query
    int64_t tokens;
  };

  AttentionBackward(
      const Attention& p, const Dropout& dropout, const Spans& spans, const Tensors& tensors, int64_t longest)
      : p_(p),
        dropout_(dropout),
        spans_(spans),
        t_(tensors),
        wide_K_(padded(p.K())),
        wide_V_(padded(p.V())),
        tiles_(
            kChunk * (2 * wide_K_ + 2 * wide_V_ + p.K() + p.V() + 4 * kChunk + 3) +
            3 * longest * (wide_K_ + wide_V_) + 512) {
    for (float** tile : {&q_, &dq_})
      *tile = tiles_.take(kChunk * wide_K_);
    for (float** tile : {&do_, &out_})
      *tile = tiles_.take(kChunk * wide_V_);
    for (float** tile : {&weights_, &dscores_, &dropped_, &slopes_})
      *tile = tiles_.take(kChunk * kChunk);
    for (float** row : {&logsumexp_, &inner_, &of_weights_})
      *row = tiles_.take(kChunk);
    qt_ = tiles_.take(p.K() * kChunk);
    dot_ = tiles_.take(p.V() * kChunk);
    for (float** rows : {&k_, &dk_, &dk_sum_})
      *rows = tiles_.take(longest * wide_K_);
    for (float** rows : {&v_, &dv_, &dv_sum_})
      *rows = tiles_.take(longest * wide_V_);
  }

  // Of some heads of one group; place: among the heads of dk and dv.
  void run(int64_t span, Range heads, int64_t place) {
    const Chunks& of_keys = spans_.keys();
    const Range chunks{of_keys.of[span], of_keys.of[span + 1]}, keys = spans_.keys_of(span);
    const int64_t group = heads.begin / p_.heads_of_group(), length = keys.end - keys.begin;
    start_ = keys.begin;
    for (int64_t c = chunks.begin; c < chunks.end; ++c) {
      p_.k.load(of_keys.all[c], group, k_ + row(c) * wide_K_, wide_K_);
      p_.v.load(of_keys.all[c], group, v_ + row(c) * wide_V_, wide_V_);
    }
    for (int64_t h = heads.begin; h < heads.end; ++h) {
      std::fill_n(dk_, length * wide_K_, 0.f);
      std::fill_n(dv_, length * wide_V_, 0.f);
      for (int64_t c = spans_.queries.of[span]; c < spans_.queries.of[span + 1]; ++c)
        queries(c, h);
      if (h == heads.begin) {
        std::swap(dk_, dk_sum_);
        std::swap(dv_, dv_sum_);
      } else {
        add_row(dk_sum_, dk_, length * wide_K_, 1);
        add_row(dv_sum_, dv_, length * wide_V_, 1);
      }
    }
    for (int64_t c = chunks.begin; c < chunks.end; ++c) {
      t_.dk.store(of_keys.all[c], place, dk_sum_ + row(c) * wide_K_, wide_K_);
      t_.dv.store(of_keys.all[c], place, dv_sum_ + row(c) * wide_V_, wide_V_);
    }
  }

 private:
  // Of a chunk's first key, in its span.
  int64_t row(int64_t c) const {
    return spans_.keys().all[c].begin - start_;
  }

  void queries(int64_t c, int64_t h) {
    const Chunk& queries = spans_.queries.all[c];
    p_.q.load(queries, h, q_, wide_K_);
    p_.q.load_transposed(queries, h, qt_, kChunk);
    t_.dout.load(queries, h, do_, wide_V_);
    t_.dout.load_transposed(queries, h, dot_, kChunk);
    t_.out.load(queries, h, out_, wide_V_);
    for (int64_t i = 0; i < queries.length; ++i) {
      logsumexp_[i] = t_.logsumexp[h * t_.tokens + queries.begin + i] * kLog2e;
      inner_[i] = dot_row(do_ + i * wide_V_, out_ + i * wide_V_, wide_V_);
    }
    std::fill_n(of_weights_, kChunk, 0.f);
    std::fill_n(dq_, queries.length * wide_K_, 0.f);
    const Range seen = spans_.chunks_of_keys(p_.seen, c);
    for (int64_t of_keys = seen.begin; of_keys < seen.end; ++of_keys) {
      const Pair pair(p_.seen, spans_, queries, spans_.keys().all[of_keys]);
      const int64_t at = row(of_keys);
      const float *k = k_ + at * wide_K_, *v = v_ + at * wide_V_;
      multiply_seen(pair, p_.K(), Left{k, wide_K_}, qt_, weights_);
      multiply_seen(pair, p_.V(), Left{v, wide_V_}, dot_, dscores_);
      if (p_.made())
        make_scores(p_, pair, queries, h, weights_, slopes_);
      if (dropout_)
        dropout_.factors(pair, spans_, c, of_keys, h, dropped_);
      weigh(pair);
      if (t_.dbias)
        store_gradients_of_biases(pair, *t_.dbias, queries, h, dscores_);
      if (p_.made())
        to_products(pair);
      add_over_queries(pair, weights_, do_, wide_V_, dv_ + at * wide_V_);
      add_over_queries(pair, dscores_, q_, wide_K_, dk_ + at * wide_K_);
      add_over_keys(pair, dscores_, k, wide_K_, dq_);
    }
    t_.dq.store(queries, h, dq_, wide_K_);
    if (t_.dsinks)
      for (int64_t i = 0; i < queries.length; ++i) {
        const float logsumexp = t_.logsumexp[h * t_.tokens + queries.begin + i];
        t_.dsinks.at(queries, h, i) = -std::exp(p_.sinks.at(queries, h, i) - logsumexp) * of_weights_[i];
      }
  }

  // Scores become weights, and the gradients of weights those of scores; 0 where nobody sees a key.
  void weigh(const Pair& pair) {
    const float to_scores = p_.made() ? 1.f : p_.scale;
    const Vec factor(to_scores * kLog2e), scale(to_scores), zero(0.f);
    const bool all = pair.all();
    pair.for_bands_of_rows([&](Range band, Range seeing) {
      for (int64_t j = band.begin; j < band.end; ++j)
        for (int64_t i = seeing.begin; i < seeing.end; i += kVec) {
          const int64_t at = j * kChunk + i;
          Vec weight = exp2(at::vec::fmsub(Vec::loadu(weights_ + at), factor, Vec::loadu(logsumexp_ + i)));
          const Vec dropped = dropout_ ? Vec::loadu(dropped_ + at) : Vec(1.f), dweight = Vec::loadu(dscores_ + at);
          Vec dscore = weight * scale * at::vec::fmsub(dweight, dropped, Vec::loadu(inner_ + i));
          weight = weight * dropped;
          Vec product = weight * dweight;
          if (!all) {
            const Vec hidden = pair.hidden(j, i);
            weight = Vec::blendv(weight, zero, hidden);
            dscore = Vec::blendv(dscore, zero, hidden);
            product = Vec::blendv(product, zero, hidden);
          }
          if (t_.dsinks)
            (Vec::loadu(of_weights_ + i) + product).store(of_weights_ + i);
          weight.store(weights_ + at);
          dscore.store(dscores_ + at);
        }
    });
  }

  // The gradients of scores become those of q . k.
  void to_products(const Pair& pair) {
    pair.for_bands_of_rows([&](Range band, Range seeing) {
      for (int64_t j = band.begin; j < band.end; ++j)
        for (int64_t i = seeing.begin; i < seeing.end; i += kVec) {
          const int64_t at = j * kChunk + i;
          (Vec::loadu(dscores_ + at) * Vec::loadu(slopes_ + at)).store(dscores_ + at);
        }
    });
  }

  // sums (keys, width) += tile . rows (queries, width)
  static void add_over_queries(const Pair& pair, const float* tile, const float* rows, int64_t width, float* sums) {
    pair.for_bands_of_rows([&](Range band, Range seeing) {
      const Left weights = Left{tile, kChunk}.at(band.begin, seeing.begin);
      const int64_t end = std::min(seeing.end, pair.queries);
      multiply(
          band.end - band.begin, width, end - seeing.begin, weights, rows + seeing.begin * width, width,
          sums + band.begin * width, width, true);
    });
  }

  const Attention& p_;
  const Dropout& dropout_;
  const Spans& spans_;
  const Tensors& t_;
  const int64_t wide_K_, wide_V_;
  Tiles tiles_;
  int64_t start_ = 0; // of the keys
  float *q_, *dq_, *do_, *out_; // (64, K) and (64, V)
  float *qt_, *dot_; // (K, 64) and (V, 64)
  float *weights_, *dscores_, *dropped_, *slopes_; // (64, 64)
  float *logsumexp_, *inner_, *of_weights_; // (64,)
  float *k_, *v_, *dk_, *dv_, *dk_sum_, *dv_sum_; // of all keys of a span
};

// (1, T, H, D) -> (1, T, G, D) in dtype: the sum over the heads of each group, in order.
inline Tensor sum_of_heads(const Tensor& of_heads, int64_t groups, at::ScalarType dtype) {
  const int64_t T = of_heads.size(1), heads = of_heads.size(2) / groups, D = of_heads.size(3);
  Tensor sums = at::empty({1, T, groups, D}, of_heads.options().dtype(dtype));
  const float* from = of_heads.const_data_ptr<float>();
  with_dtype(dtype, [&](auto zero) {
    auto* to = sums.mutable_data_ptr<decltype(zero)>();
    at::parallel_for(0, T * groups, 64, [&](int64_t begin, int64_t end) {
      std::vector<float> sum(D);
      for (int64_t at = begin; at < end; ++at) {
        const float* parts = from + at * heads * D;
        std::copy_n(parts, D, sum.data());
        for (int64_t h = 1; h < heads; ++h)
          for (int64_t d = 0; d < D; ++d)
            sum[d] += parts[h * D + d];
        store_run(sum.data(), D, to + at * D);
      }
    });
  });
  return sums;
}

} // namespace packc
