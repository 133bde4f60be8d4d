// exp2, softplus, sigmoid and tanh for fp32 vectors: a few ulp, in a third of the instructions of the usual library calls.
#pragma once

#include "tile.h"

namespace packc {

constexpr float kLog2e = 1.44269504089f;
constexpr float kLn2 = 0.69314718056f;

// 2^x = 2^n 2^f with n the nearest integer: f in [-1/2, 1/2] by a polynomial (relative error 9e-8, exact at 0), n added
// to its exponent bits. Beyond the clamp lie inf above and 2^-126 for zero below; a NaN comes through the clamp.
inline Vec exp2(Vec x) {
  using Bits = at::vec::Vectorized<int32_t>;
  // Adding it rounds to an integer, which then fills the low bits.
  const Vec round(12582912.f);
  x = at::vec::clamp(x, Vec(-126.f), Vec(128.f));
  const Vec shifted = x + round;
  const Vec f = x - (shifted - round);
  Vec p(1.326472746e-3f);
  p = at::vec::fmadd(p, f, Vec(9.671512819e-3f));
  p = at::vec::fmadd(p, f, Vec(5.550733744e-2f));
  p = at::vec::fmadd(p, f, Vec(2.402224208e-1f));
  p = at::vec::fmadd(p, f, Vec(6.931469776e-1f));
  p = at::vec::fmadd(p, f, Vec(1.f));
  const Bits n = at::vec::cast<int32_t>(shifted) << Bits(23);
  return at::vec::cast<float>(at::vec::cast<int32_t>(p) + n);
}

inline Vec accurate_sigmoid(Vec x) {
  const Vec one(1.f);
  return one / (one + exp2(x * Vec(-kLog2e)));
}

// max(x, 0) + log(1 + e) with e = exp(-|x|); log(1 + e) = 2 atanh(e / (2 + e)), whose series keeps relative accuracy
// however small e is.
inline Vec softplus(Vec x) {
  const Vec e = exp2(x.abs() * Vec(-kLog2e));
  const Vec s = e / (e + Vec(2.f)), s2 = s * s;
  Vec p(1.408916778e-1f);
  p = at::vec::fmadd(p, s2, Vec(1.398030149e-1f));
  p = at::vec::fmadd(p, s2, Vec(2.001245511e-1f));
  p = at::vec::fmadd(p, s2, Vec(3.333315734e-1f));
  p = at::vec::fmadd(p, s2, Vec(1.f));
  return at::vec::fmadd(s + s, p, at::vec::clamp_min(x, Vec(0.f)));
}

// Up to 0.7 an odd polynomial (relative error 7e-10), so that small numbers keep their digits; beyond, 1 - 2 / (e^2x + 1).
inline Vec tanh(Vec x) {
  const Vec size = x.abs(), square = x * x;
  Vec p(1.8956571584567428e-3f);
  p = at::vec::fmadd(p, square, Vec(-7.88329541683197e-3f));
  p = at::vec::fmadd(p, square, Vec(2.1571053192019463e-2f));
  p = at::vec::fmadd(p, square, Vec(-5.392095074057579e-2f));
  p = at::vec::fmadd(p, square, Vec(1.33329838514328e-1f));
  p = at::vec::fmadd(p, square, Vec(-3.3333325386047363e-1f));
  const Vec small = at::vec::fmadd(x * square, p, x);
  const Vec large = Vec(1.f) - Vec(2.f) / (exp2(size * Vec(2 * kLog2e)) + Vec(1.f));
  const Vec signed_large = Vec::blendv(large, large.neg(), x < Vec(0.f));
  return Vec::blendv(signed_large, small, size < Vec(0.7f));
}

} // namespace packc
