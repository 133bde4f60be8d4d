#pragma once

#include "tile.h"

namespace packc {

// 2^x within 2 ulp for |x| <= 126, and as if for -126 or 126 beyond (so NaN turns finite). Shorter than ATen's exp_u20,
// and more accurate: the activations are bound by the length of this chain of instructions.
inline Vec exp2_clamped(Vec x) {
  using Int = at::vec::Vectorized<int32_t>;
  const Vec magic(12582912.f); // 1.5 * 2^23: adding it rounds to an integer, in the low bits
  x = at::vec::clamp(x, Vec(-126.f), Vec(126.f));
  const Vec shifted = x + magic, f = x - (shifted - magic), f2 = f * f;
  // Minimax polynomial of 2^f on [-1/2, 1/2].
  const Vec low = at::vec::fmadd(f, Vec(0.693146967f), Vec(1.00000007f));
  const Vec middle = at::vec::fmadd(f, Vec(0.0555071327f), Vec(0.240221197f));
  const Vec high = at::vec::fmadd(f, Vec(0.00132764718f), Vec(0.00967554133f));
  const Vec p = at::vec::fmadd(at::vec::fmadd(high, f2, middle), f2, low);
  // Times 2^n: n added to the exponent.
  const Int exponent = at::vec::cast<int32_t>(shifted) << Int(23);
  return at::vec::cast<float>(at::vec::cast<int32_t>(p) + exponent);
}

inline Vec sigmoid(Vec x) {
  return Vec(1.f) / (Vec(1.f) + exp2_clamped(x * Vec(-1.44269504f)));
}

// x sigmoid(x); NaN stays NaN.
inline Vec silu(Vec x) {
  return x / (Vec(1.f) + exp2_clamped(x * Vec(-1.44269504f)));
}

// The derivative of silu: s (1 + x (1 - s)) with s the sigmoid.
inline Vec silu_slope(Vec x) {
  const Vec s = sigmoid(x);
  return s * at::vec::fmadd(x, Vec(1.f) - s, Vec(1.f));
}

} // namespace packc
