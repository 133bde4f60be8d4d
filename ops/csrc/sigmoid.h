#pragma once

#include "tile.h"

namespace packc {

// exp_u20 keeps 20 ulp, far inside what fp32 activations need. It clamps its argument, so exp_u20(NaN) is finite: the
// callers multiply by x itself, which brings a NaN back.
inline Vec sigmoid(Vec x) {
  const Vec one(1.f);
  return one / (one + x.neg().exp_u20());
}

} // namespace packc
