// A gate with a decay per channel of the keys: products of pairs of tokens have decays inside their sums.
//
// exp(b_i - b_j), b the sums of g from the chunk's start, would overflow as exp(b_i) exp(-b_j). So chunks are cut into
// blocks of 16 tokens. Between blocks, decays go from token j to the end of its block, through whole blocks, and from
// the start of i's block to i: all at most 1, and a product of matrices for every two blocks. Within a block the decays
// of single tokens are multiplied, pair by pair.
#pragma once

#include "gated_delta_rule.h"

namespace packc {

class ChannelGate {
 public:
  using Gradient = Heads;

  ChannelGate(const at::Tensor& g, int64_t K)
      : g_(g),
        K_(K),
        width_(padded(K)),
        tiles_((8 * kChunk + kBlock + kBlocks + 1) * width_ + K * kApart + 512) {
    for (float** tile : {&log_, &from_start_, &to_end_, &step_, &block_start_, &block_end_, &a_, &b_})
      *tile = tiles_.take(kChunk * width_);
    ended_transposed_ = tiles_.take(K * kApart);
    block_ = tiles_.take(kBlock * width_);
    through_ = tiles_.take(kBlocks * width_);
    whole_ = tiles_.take(width_);
  }

  void key_products(const Chunk&, const float*, const float*) {}
  void query_products(const Chunk&, const float*, const float*) {}

  void head(const Chunk& chunk, int64_t h) {
    length_ = chunk.length;
    g_.load(chunk, h, log_, width_);
    for (int64_t c = 0; c < width_; c += kVec) {
      Vec sum(0.f);
      for (int64_t i = 0; i < length_; ++i) {
        const Vec log = Vec::loadu(log_ + i * width_ + c) * Vec(kLog2e);
        log.store(log_ + i * width_ + c);
        sum = sum + log;
        exp2(sum).store(from_start_ + i * width_ + c);
      }
      exp2(sum).store(whole_ + c);
      sums_to_end(0, length_, c, to_end_);
    }
  }
  void head_with_pairs(const Chunk& chunk, int64_t h) {
    head(chunk, h);
    for (int64_t c = 0; c < width_; c += kVec)
      for (int64_t first = 0; first < length_; first += kBlock) {
        const int64_t end = std::min(first + kBlock, length_);
        Vec sum(0.f);
        for (int64_t i = first; i < end; ++i) {
          const Vec log = Vec::loadu(log_ + i * width_ + c);
          sum = sum + log;
          exp2(log).store(step_ + i * width_ + c);
          exp2(sum).store(block_start_ + i * width_ + c);
        }
        exp2(sum).store(through_ + first / kBlock * width_ + c);
        sums_to_end(first, end, c, block_end_);
      }
  }

  // out_i = factor from_start_i x_i
  void from_start(const float* x, float factor, float* out) const {
    decay(from_start_, x, factor, out);
  }
  void to_end(const float* x, float* out) const {
    decay(to_end_, x, 1, out);
  }
  float whole(int64_t channel) const {
    return whole_[channel];
  }

  // k_i . k_j, j < i
  void key_pairs(const float*, const float* k, float* out) const {
    pairs(k, k, out);
    for (int64_t i = 0; i < length_; ++i)
      out[i * kChunk + i] = 0;
  }
  // q_i . k_j, j <= i
  void query_pairs(const float* q, const float* k, float* out) const {
    pairs(q, k, out);
  }

  // From the gradients of q_i . k_j in x and of k_i . k_j in y, both j < i: adds those of q_i and of k_i, and sets that
  // of k_j.
  void pull(const float* q, const float* k, float* x, float* y, float* dq, float* dk_row, float* dk_column) const {
    pull_rows(k, x, dq);
    pull_rows(k, y, dk_row);
    decay(block_start_, q, 1, a_);
    decay(block_start_, k, 1, b_);
    for (int64_t j = 0; j < length_; j += kBlock) {
      const int64_t columns = std::min(kBlock, length_ - j);
      float* const block = dk_column + j * width_;
      std::fill_n(block, columns * width_, 0.f);
      for (int64_t i = (length_ - 1) / kBlock * kBlock; i > j; i -= kBlock) {
        through_block(i, columns, block);
        const int64_t rows = std::min(kBlock, length_ - i), at = i * kChunk + j;
        for (const auto& [pairs, tile] : {std::pair{x, a_}, std::pair{y, b_}}) {
          const Left left = Left{pairs + at, kChunk}.transposed();
          multiply(columns, width_, rows, left, tile + i * width_, width_, block, width_, true);
        }
      }
      multiply_rows(block, block_end_ + j * width_, columns * width_);
      std::fill_n(block_, columns * width_, 0.f);
      for (int64_t i = columns - 1; i > 0; --i)
        for (int64_t m = 0; m < i; ++m) {
          const int64_t at = (j + i) * width_, pair = (j + i) * kChunk + j + m;
          add_row(block_ + m * width_, q + at, width_, x[pair]);
          add_row(block_ + m * width_, k + at, width_, y[pair]);
          multiply_rows(block_ + m * width_, step_ + at, width_);
        }
      for (int64_t m = 0; m < columns; ++m)
        add_row(block + m * width_, block_ + m * width_, width_, 1);
    }
  }

  void store(const Gradient& dg, const Chunk& chunk, int64_t h, const float* tile) const {
    dg.store(chunk, h, tile, width_);
  }

 private:
  static constexpr int64_t kBlock = kColumns, kBlocks = kChunk / kBlock;

  // Of tokens first .. end: what is left of each at the end.
  void sums_to_end(int64_t first, int64_t end, int64_t c, float* out) {
    Vec sum(0.f);
    for (int64_t j = end - 1; j >= first; --j) {
      exp2(sum).store(out + j * width_ + c);
      sum = sum + Vec::loadu(log_ + j * width_ + c);
    }
  }
  void decay(const float* decays, const float* x, float factor, float* out) const {
    for (int64_t at = 0; at < length_ * width_; at += kVec)
      (Vec(factor) * Vec::loadu(decays + at) * Vec::loadu(x + at)).store(out + at);
  }
  void through_block(int64_t first, int64_t rows, float* x) const {
    for (int64_t i = 0; i < rows; ++i)
      multiply_rows(x + i * width_, through_ + first / kBlock * width_, width_);
  }

  void pairs(const float* x, const float* k, float* out) const {
    decay(block_end_, k, 1, a_);
    transpose(a_, length_, K_, width_, ended_transposed_);
    decay(block_start_, x, 1, b_);
    for (int64_t i = 0; i < length_; i += kBlock) {
      const int64_t rows = std::min(kBlock, length_ - i);
      for (int64_t j = i - kBlock; j >= 0; j -= kBlock) {
        const float* ended = ended_transposed_ + j;
        multiply(rows, kBlock, K_, Left{b_ + i * width_, width_}, ended, kApart, out + i * kChunk + j, kChunk, false);
        through_block(j, rows, b_ + i * width_);
      }
      for (int64_t m = 0; m < rows; ++m) {
        float* row = out + (i + m) * kChunk + i;
        approach(k, i, m);
        for (int64_t j = 0; j <= m; ++j)
          row[j] = dot_row(x + (i + m) * width_, block_ + j * width_, width_);
        std::fill(row + m + 1, row + kBlock, 0.f);
      }
    }
  }
  // block_: what is left of the keys of a block in its token m, one after the other.
  void approach(const float* k, int64_t first, int64_t m) const {
    for (int64_t j = 0; j < m; ++j)
      multiply_rows(block_ + j * width_, step_ + (first + m) * width_, width_);
    std::copy_n(k + (first + m) * width_, width_, block_ + m * width_);
  }

  // out_i += sum_{j < i} pairs_ij decay_ij k_j
  void pull_rows(const float* k, const float* pairs, float* out) const {
    decay(block_end_, k, 1, a_);
    for (int64_t i = 0; i < length_; i += kBlock) {
      const int64_t rows = std::min(kBlock, length_ - i);
      std::fill_n(b_, rows * width_, 0.f);
      for (int64_t j = 0; j < i; j += kBlock) {
        through_block(j, rows, b_);
        const Left left{pairs + i * kChunk + j, kChunk};
        multiply(rows, width_, kBlock, left, a_ + j * width_, width_, b_, width_, true);
      }
      multiply_rows(b_, block_start_ + i * width_, rows * width_);
      for (int64_t m = 0; m < rows; ++m) {
        float* const row = out + (i + m) * width_;
        add_row(row, b_ + m * width_, width_, 1);
        approach(k, i, m);
        for (int64_t j = 0; j < m; ++j)
          add_row(row, block_ + j * width_, width_, pairs[(i + m) * kChunk + i + j]);
      }
    }
  }

  const Heads g_;
  const int64_t K_, width_;
  int64_t length_ = 0;
  Tiles tiles_;
  float *log_, *from_start_, *to_end_; // (64, K); log_ to base 2
  float *step_, *block_start_, *block_end_; // of a token; from its block's start; to its block's end
  float *a_, *b_; // (64, K), of one function
  float* ended_transposed_; // (K, 64)
  float* block_; // (16, K)
  float* through_; // (4, K): whole blocks
  float* whole_; // (K,)
};

} // namespace packc
