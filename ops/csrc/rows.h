// Rows of fp32 tiles, whole vectors long.
#pragma once

#include "tile.h"

namespace packc {

inline void scale_row(float* row, int64_t width, float factor) {
  for (int64_t j = 0; j < width; j += kVec)
    (Vec::loadu(row + j) * Vec(factor)).store(row + j);
}

// row += factor * other
inline void add_row(float* row, const float* other, int64_t width, float factor) {
  for (int64_t j = 0; j < width; j += kVec)
    at::vec::fmadd(Vec(factor), Vec::loadu(other + j), Vec::loadu(row + j)).store(row + j);
}

inline float dot_row(const float* x, const float* y, int64_t width) {
  Vec sum(0.f);
  for (int64_t j = 0; j < width; j += kVec)
    sum = at::vec::fmadd(Vec::loadu(x + j), Vec::loadu(y + j), sum);
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, sum);
}

} // namespace packc
