// The gated delta rule in chunks: what the forward and the backward share.
//
// Within a chunk that the state S enters, from_start_i is how much of what enters is left in token i, to_end_j how much
// of token j in what leaves, for every channel of K; the products . of two tokens sum over channels, each with how much
// of the earlier token is left in the later one:
//
//     r_i  = v_i - S^T (from_start_i k_i)
//     e_i  = r_i - sum_{j < i} (k_i . k_j) u_j,   u_j = beta_j e_j
//     o_i  = scale (S^T (from_start_i q_i) + sum_{j <= i} (q_i . k_j) u_j)
//     S'   = whole S + sum_j (to_end_j k_j) u_j^T
//
// With M_ij = k_i . k_j below the diagonal, e = r - M beta e is solved by a matrix that depends on no state: R with
//
//     R = -M (1 + beta M)^-1 = -M - M beta R,     e = r + R beta r
//
// (the WY representation, DeltaNet, https://arxiv.org/abs/2406.06484, kept free of divisions by beta on either side).
#pragma once

#include "chunks.h"
#include "gemm.h"
#include "rows.h"
#include "states.h"

namespace packc {

// The distance of rows in tiles that are read or written down their columns: powers of two would all meet in the same
// few sets of a cache.
constexpr int64_t apart(int64_t columns) {
  return padded(columns) + kColumns;
}
constexpr int64_t kApart = apart(kChunk);

struct GatedDeltaRule {
  Heads q, k; // (B, L, G, K)
  Heads v; // (B, L, H, V)
  PerHead beta; // (B, L, H)
  float scale;
  int64_t heads, groups, tokens, slots; // tokens and chunk states of a row
  bool no_values = false; // v is zero everywhere
  bool walked = false; // what phases hand on is kept of one chunk and the heads of one group, not of all

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
  // Of a dense (length, width) tile of a chunk and head.
  int64_t tile_at(const Chunk& chunk, int64_t head, int64_t width) const {
    if (walked)
      return head % (heads / groups) * kChunk * width;
    return ((chunk.row * tokens + chunk.begin) * heads + head * chunk.length) * width;
  }
  // All tiles of a chunk and the heads of a group.
  int64_t tiles_of_group(int64_t width) const {
    return heads / groups * kChunk * width;
  }
  GatedDeltaRule for_walking() const {
    GatedDeltaRule p = *this;
    p.walked = true;
    return p;
  }
  int64_t tiles(int64_t rows, int64_t width) const {
    return rows * tokens * heads * width;
  }
};

// out[channel][token] = x[token][channel], rows kApart apart. Out of a tile: a tensor's tokens may be pages apart.
inline void transpose(const float* x, int64_t tokens, int64_t channels, int64_t width, float* out) {
  load_tile(Block<const float>{x, 1, width}, channels, tokens, out, kApart);
}

// x *= y
inline void multiply_rows(float* x, const float* y, int64_t floats) {
  for (int64_t i = 0; i < floats; i += kVec)
    (Vec::loadu(x + i) * Vec::loadu(y + i)).store(x + i);
}

// out_i = factor beta_i x_i
inline void scale_by_beta(
    const GatedDeltaRule& p,
    const Chunk& chunk,
    int64_t h,
    float factor,
    const float* x,
    int64_t x_row,
    int64_t width,
    float* out,
    int64_t out_row) {
  for (int64_t i = 0; i < chunk.length; ++i) {
    const Vec beta(factor * p.beta.at(chunk, h, i));
    for (int64_t j = 0; j < width; j += kVec)
      (beta * Vec::loadu(x + i * x_row + j)).store(out + i * out_row + j);
  }
}

// R from M, both (64, 64) with zeros above the diagonal as far as products of triangles read; M is lost.
inline void resolve(const GatedDeltaRule& p, const Chunk& chunk, int64_t h, float* m, float* r) {
  const int64_t length = chunk.length;
  for (int64_t first = 0; first < length; first += kColumns) {
    const int64_t rows = std::min(kColumns, length - first), end = first + kColumns;
    float* const band = m + first * kChunk;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < end; j += kVec)
        (Vec(0.f) - Vec::loadu(band + i * kChunk + j)).store(r + (first + i) * kChunk + j);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < first + i; ++j)
        band[i * kChunk + j] *= -p.beta.at(chunk, h, j);
    for (int64_t j = 0; j < first; j += kColumns) {
      const Left left{band + j, kChunk};
      multiply(rows, kColumns, first - j, left, r + j * kChunk + j, kChunk, r + first * kChunk + j, kChunk, true);
    }
    for (int64_t i = 1; i < rows; ++i)
      for (int64_t j = 0; j < i; ++j)
        add_row(r + (first + i) * kChunk, r + (first + j) * kChunk, end, band[i * kChunk + first + j]);
  }
}

// The state that enters a chunk, rows of padded V: where it is kept, or loaded into `own`; null where it is zero.
inline const float* entering_state(
    const GatedDeltaRule& p, const Chunk& chunk, int64_t h, States initial, const float* chunk_states, float* own) {
  if (!chunk.first)
    return chunk_states + p.state_at(chunk, h);
  if (!initial)
    return nullptr;
  initial.load(chunk.document, h, p.K(), 0, p.V(), own, padded(p.V()));
  return own;
}

} // namespace packc
