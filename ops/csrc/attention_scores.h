// What becomes of q . k before the softmax, where that is more than a scale:
//
//   s_ij = cap tanh(scale q_i . k_j / cap) + bias_i[how many tokens j is before i]
//
// and the way back, to the gradients of q . k and of the biases.
#pragma once

#include "varlen_attention.h"

namespace packc {

// The scores of a pair's tile (keys, queries) in the place of q . k; with slopes, their derivative by that.
inline void make_scores(const Attention& p, const Pair& pair, const Chunk& queries, int64_t h, float* tile, float* slopes) {
  const Vec scale(p.scale), one(1.f), cap(p.cap), by(p.cap > 0 ? p.scale / p.cap : 0.f);
  pair.for_bands_of_rows([&](Range band, Range seeing) {
    for (int64_t j = band.begin; j < band.end; ++j)
      for (int64_t i = seeing.begin; i < seeing.end; i += kVec) {
        const int64_t at = j * kChunk + i;
        const Vec product = Vec::loadu(tile + at);
        if (p.cap > 0) {
          const Vec share = tanh(product * by);
          (cap * share).store(tile + at);
          if (slopes)
            (scale * at::vec::fnmadd(share, share, one)).store(slopes + at);
        } else {
          (product * scale).store(tile + at);
          if (slopes)
            scale.store(slopes + at);
        }
      }
  });
  if (p.bias)
    with_dtype(p.bias->dtype, [&](auto zero) {
      for_each_biased(pair, p.bias->block<const decltype(zero)>(queries, h), p.bias->channels, [&](int64_t at, auto& bias) {
        tile[at] += static_cast<float>(bias);
      });
    });
}

// The gradients of scores, of a pair whose biases no other pair has.
inline void store_gradients_of_biases(const Pair& pair, const Heads& dbias, const Chunk& queries, int64_t h, const float* dscores) {
  with_dtype(dbias.dtype, [&](auto zero) {
    using T = decltype(zero);
    for_each_biased(pair, dbias.block<T>(queries, h), dbias.channels, [&](int64_t at, T& bias) {
      bias = static_cast<T>(dscores[at]);
    });
  });
}

// body(where a score is in its tile, its bias), of each that is seen and has one.
template <typename T, typename Body>
inline void for_each_biased(const Pair& pair, const Block<T>& biases, int64_t distances, const Body& body) {
  for (int64_t i = 0; i < pair.queries; ++i) {
    const Range seen = pair.rows(i, i + 1);
    const int64_t back = pair.shift + i; // from key 0
    const int64_t first = std::max(seen.begin, back - distances + 1), end = std::min(seen.end, back + 1);
    T* bias = biases.at(i, back).data;
    for (int64_t j = first; j < end; ++j)
      body(j * kChunk + i, bias[-j * biases.channel_stride]);
  }
}

} // namespace packc
