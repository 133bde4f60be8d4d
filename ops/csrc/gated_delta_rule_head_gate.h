// A gate with one decay per head and token: products of keys and queries are those of their group, times decays.
#pragma once

#include "gated_delta_rule.h"

namespace packc {

class HeadGate {
 public:
  using Gradient = PerHead;

  HeadGate(const at::Tensor& g, int64_t K)
      : g_(g),
        K_(K),
        width_(padded(K)),
        tiles_(3 * kChunk * kChunk + 64),
        keys_(tiles_.take(kChunk * kChunk)),
        queries_(tiles_.take(kChunk * kChunk)),
        between_(tiles_.take(kChunk * kChunk)) {}

  // Products of a group, for the pairs of its heads; kt is k transposed, rows kApart apart.
  void key_products(const Chunk& chunk, const float* k, const float* kt) {
    multiply_into_triangle(chunk.length, K_, Left{k, width_}, kt, kApart, keys_, kChunk);
  }
  void query_products(const Chunk& chunk, const float* q, const float* kt) {
    multiply_into_triangle(chunk.length, K_, Left{q, width_}, kt, kApart, queries_, kChunk);
  }

  void head(const Chunk& chunk, int64_t h) {
    decays_.emplace(g_, chunk, h);
  }
  void head_with_pairs(const Chunk& chunk, int64_t h) {
    head(chunk, h);
    decays_->between(between_);
  }

  // out_i = factor from_start_i x_i
  void from_start(const float* x, float factor, float* out) const {
    decay(decays_->from_start, x, factor, out);
  }
  void to_end(const float* x, float* out) const {
    decay(decays_->to_end, x, 1, out);
  }
  float whole(int64_t) const {
    return decays_->whole;
  }

  // k_i . k_j, j < i
  void key_pairs(const float*, const float*, float* out) const {
    decay_pairs(keys_, out);
    for (int64_t i = 0; i < decays_->length; ++i)
      out[i * kChunk + i] = 0;
  }
  // q_i . k_j, j <= i
  void query_pairs(const float*, const float*, float* out) const {
    decay_pairs(queries_, out);
  }

  // From the gradients of q_i . k_j in x and of k_i . k_j in y, both j < i and lost: adds those of q_i and of k_i, and
  // sets that of k_j.
  void pull(const float* q, const float* k, float* x, float* y, float* dq, float* dk_row, float* dk_column) const {
    const int64_t length = decays_->length;
    std::fill_n(dk_column, length * width_, 0.f);
    for (float* pairs : {x, y})
      decay_pairs(pairs, pairs);
    multiply_triangle(length, width_, Left{x, kChunk}, k, width_, dq, width_);
    multiply_triangle(length, width_, Left{y, kChunk}, k, width_, dk_row, width_);
    multiply_triangle_transposed(length, width_, Left{x, kChunk}, q, width_, dk_column, width_);
    multiply_triangle_transposed(length, width_, Left{y, kChunk}, k, width_, dk_column, width_);
  }

  void store(const Gradient& dg, const Chunk& chunk, int64_t h, const float* tile) const {
    for (int64_t i = 0; i < chunk.length; ++i) {
      Vec sum(0.f);
      for (int64_t c = 0; c < width_; c += kVec)
        sum = sum + Vec::loadu(tile + i * width_ + c);
      dg.at(chunk, h, i) = at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, sum);
    }
  }

 private:
  void decay(const float* decays, const float* x, float factor, float* out) const {
    for (int64_t i = 0; i < decays_->length; ++i) {
      const Vec by(factor * decays[i]);
      for (int64_t c = 0; c < width_; c += kVec)
        (by * Vec::loadu(x + i * width_ + c)).store(out + i * width_ + c);
    }
  }
  void decay_pairs(const float* products, float* out) const {
    for (int64_t i = 0; i < decays_->length; ++i)
      for (int64_t j = 0; j < (i / kColumns + 1) * kColumns; j += kVec) {
        const int64_t at = i * kChunk + j;
        (Vec::loadu(between_ + at) * Vec::loadu(products + at)).store(out + at);
      }
  }

  const PerHead g_;
  const int64_t K_, width_;
  std::optional<Decays> decays_;
  Tiles tiles_;
  float *keys_, *queries_, *between_; // (64, 64)
};

} // namespace packc
