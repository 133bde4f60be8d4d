// Softmax attention within spans, of which documents are the usual ones: what its forward and backward share.
//
//   s_ij = scale q_i . k_j,   p_ij = exp(s_ij - lse_i),   o_i = sum_j p_ij v_j   over the keys j that i sees
//
// Scores may be capped and have biases (attention_scores.h). A sink is one more key, of value 0, whose score is known.
//
// Queries and keys of a span are cut into chunks of 64 tokens from their own start, and queries of one chunk meet keys
// of one chunk in a tile. Tiles of scores have a row per key and a column per query: what is taken over keys is then
// taken lane by lane, and either product that follows reads the tile in place. Only what some query sees is computed, in
// bands of kColumns.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "attention_spans.h"
#include "gemm.h"

namespace packc {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

using at::Tensor;

struct Attention {
  Heads q; // (1, T_q, H, K)
  Heads k, v; // (1, T_k, G, K) and (1, T_k, G, V)
  float scale;
  Seen seen;
  int64_t heads, groups;
  float cap = 0; // of scores; 0 for none
  std::optional<Heads> bias; // (1, T_q, H, R)
  PerHead sinks{Tensor()}; // (1, T_q, H), of each head alone with a stride of 0

  // Whether scores are more than products with a scale.
  bool made() const {
    return cap > 0 || bias;
  }
  int64_t K() const {
    return q.channels;
  }
  int64_t V() const {
    return v.channels;
  }
  int64_t heads_of_group() const {
    return heads / groups;
  }
};

// In whole bands.
inline Range banded(Range range) {
  return {range.begin / kColumns * kColumns, padded(range.end)};
}

// The queries of one chunk against the keys of another of the same span.
struct Pair {
  int64_t queries, keys; // how many
  int64_t shift; // of the first query from the first key, in tokens
  int64_t least, most; // a query in column i sees the keys in rows i - most .. i - least

  Pair(const Seen& seen, const Spans& spans, const Chunk& of_queries, const Chunk& of_keys)
      : queries(of_queries.length),
        keys(of_keys.length),
        shift(spans.place(of_queries) - of_keys.begin),
        least(seen.least - shift),
        most(seen.most - shift) {}

  // The columns that see one of the rows [first, end).
  Range columns(int64_t first, int64_t end) const {
    return {std::max<int64_t>(first + least, 0), std::min(end - 1 + most + 1, queries)};
  }
  // The rows that one of the columns [first, end) sees.
  Range rows(int64_t first, int64_t end) const {
    return {std::max<int64_t>(first - most, 0), std::min(end - 1 - least + 1, keys)};
  }
  bool all() const {
    return queries - 1 <= most && -(keys - 1) >= least;
  }
  // Of each lane, from a column on: whether its query does not see the key of a row.
  Vec hidden(int64_t row, int64_t column) const {
    const Vec distance = Vec::arange(static_cast<float>(column - row), 1.f);
    return (distance < Vec(bound(least))) | (distance > Vec(bound(most)));
  }

  // Products over the bands of rows or columns; all at once where all is seen.
  template <typename Body> // body(rows, columns in whole bands)
  void for_bands_of_rows(const Body& body) const {
    const int64_t step = all() ? keys : kColumns;
    for (int64_t first = 0; first < keys; first += step) {
      const Range band{first, std::min(first + step, keys)}, seeing = columns(band.begin, band.end);
      if (!seeing.empty())
        body(band, banded(seeing));
    }
  }
  template <typename Body> // body(columns, rows)
  void for_bands_of_columns(const Body& body) const {
    const int64_t step = all() ? queries : kColumns;
    for (int64_t first = 0; first < queries; first += step) {
      const Range band{first, std::min(first + step, queries)}, seen = rows(band.begin, band.end);
      if (!seen.empty())
        body(band, seen);
    }
  }

 private:
  static float bound(int64_t distance) { // exact up to there, and no distance in a tile is larger
    return static_cast<float>(std::clamp<int64_t>(distance, -2 * kChunk, 2 * kChunk));
  }
};

// tile (keys, queries) = rows (keys, channels) . columns (channels, queries), where somebody sees somebody.
inline void multiply_seen(const Pair& pair, int64_t channels, Left rows, const float* columns, float* tile) {
  pair.for_bands_of_rows([&](Range band, Range seeing) {
    const int64_t at = band.begin * kChunk + seeing.begin;
    multiply(
        band.end - band.begin, seeing.end - seeing.begin, channels, rows.at(band.begin, 0), columns + seeing.begin, kChunk,
        tile + at, kChunk, false);
  });
}

// sums (queries, width) += tile^T . rows (keys, width); where nobody sees a key, in a band that is read, tile is 0.
inline void add_over_keys(const Pair& pair, const float* tile, const float* rows, int64_t width, float* sums) {
  pair.for_bands_of_columns([&](Range band, Range seen) {
    const Left weights = Left{tile, kChunk}.at(seen.begin, band.begin).transposed();
    multiply(
        band.end - band.begin, width, seen.end - seen.begin, weights, rows + seen.begin * width, width,
        sums + band.begin * width, width, true);
  });
}

} // namespace packc
