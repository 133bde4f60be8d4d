// The linear scan's states alone: what a segment leaves behind, forwards, and what its results owe to the state that
// enters, backwards. Of one document, which is all there is.
#pragma once

#include "linear_scan.h"

namespace packc {

// Two (1, L, D) tensors, read piece by piece: in place if their channels lie side by side, else by tiles.
class PieceReader {
 public:
  PieceReader(const Tensor& x, const Tensor& y) : x_(x), y_(y), in_place_(side_by_side({x, y})) {}

  // body(rows of x, rows of y, first channel, channels) for channels first .. end of a piece.
  template <typename Body>
  void read(const Piece& piece, int64_t first, int64_t end, const Body& body) {
    if (in_place_) {
      with_dtype(x_.scalar_type(), [&](auto zero) {
        using T = decltype(zero);
        body(rows<const T>(x_, piece, first), rows<const T>(y_, piece, first), first, end - first);
      });
      return;
    }
    for (int64_t c = first; c < end; c += kBlock) {
      const int64_t count = std::min(kBlock, end - c);
      body(xs_.load(x_, piece, c, count), ys_.load(y_, piece, c, count), c, count);
    }
  }

 private:
  const Tensor &x_, &y_;
  bool in_place_;
  Tile xs_, ys_;
};

// transition *= a and state = a state + b, token by token.
inline void summarize(
    const Group& group, int64_t first, int64_t end, PieceReader& ab, float* transition, float* state) {
  for (const Piece& piece : group)
    ab.read(piece, first, end, [&](auto a, auto b, int64_t channel, int64_t channels) {
      for (int64_t t = 0; t < piece.length; ++t)
        for_each_pair(
            channels,
            [a = a[t], b = b[t], product = transition + channel, h = state + channel](int64_t c, int64_t n) {
              const Pair a_t = load(a + c, n);
              store(a_t * load(product + c, n), product + c, n);
              store(fmadd(a_t, load(h + c, n), load(b + c, n)), h + c, n);
            });
    });
}

// dstate += a[0] .. a[t] dout[t]: in the order of memory, as there is no gradient at the end to begin with.
inline void adjoin(
    const Group& group, int64_t first, int64_t end, PieceReader& douts_a, float* transition, float* dstate) {
  for (const Piece& piece : group)
    douts_a.read(piece, first, end, [&](auto dout, auto a, int64_t channel, int64_t channels) {
      for (int64_t t = 0; t < piece.length; ++t)
        for_each_pair(
            channels,
            [dout = dout[t], a = a[t], product = transition + channel, sum = dstate + channel](int64_t c, int64_t n) {
              const Pair passed = load(a + c, n) * load(product + c, n);
              store(passed, product + c, n);
              store(fmadd(passed, load(dout + c, n), load(sum + c, n)), sum + c, n);
            });
    });
}

} // namespace packc
