// Products of small fp32 matrices that lie in a core's cache: chunks of 64 tokens by heads of 64 or 128.
//
// On blocks of 64 x 64 these reach the rate of torch.mm on large matrices, which the library call per block does not;
// and the left matrix may be read transposed, in place.
#pragma once

#include "tile.h"

namespace packc {

constexpr int64_t kColumns = 16; // widths are multiples of it
// Results are computed in blocks with sums enough to hide their latency, few enough to stay in registers: 32 of 512 bits
// or 16 that are shorter. Two vectors of columns and more share what is read of the left matrix.
constexpr int64_t kWide = std::max(kColumns, 2 * kVec);
constexpr int64_t kRows = (kVec == 16 ? 24 : 12) / (kWide / kVec);

// Rows of B some power of two apart meet in a few sets of a cache and drive each other out. Where they are read often,
// kColumns columns of them are copied side by side.
constexpr int64_t kPanel = 256; // rows of B at most
constexpr int64_t kBlocksWorthCopying = 4;

constexpr int64_t padded(int64_t columns) {
  return (columns + kColumns - 1) / kColumns * kColumns;
}

// A matrix in fp32: element (i, j) at data[i * row + j * column].
struct Left {
  const float* data;
  int64_t row;
  int64_t column = 1;

  Left at(int64_t i, int64_t j) const {
    return {data + i * row + j * column, row, column};
  }
  Left transposed() const {
    return {data, column, row};
  }
};

// Unrolled whole, at most 12 times: sums with an index that is not known would lie in memory, not in registers.
template <int64_t rows, int64_t vectors>
inline void multiply_block(int64_t k, Left a, const float* b, int64_t b_row, float* c, int64_t c_row, bool add) {
  Vec sums[rows][vectors];
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < vectors; ++j)
      sums[i][j] = add ? Vec::loadu(c + i * c_row + j * kVec) : Vec(0.f);
  for (int64_t p = 0; p < k; ++p) {
    Vec right[vectors];
#pragma GCC unroll 16
    for (int64_t j = 0; j < vectors; ++j)
      right[j] = Vec::loadu(b + p * b_row + j * kVec);
#pragma GCC unroll 16
    for (int64_t i = 0; i < rows; ++i) {
      const Vec left(a.data[i * a.row + p * a.column]);
#pragma GCC unroll 16
      for (int64_t j = 0; j < vectors; ++j)
        sums[i][j] = at::vec::fmadd(left, right[j], sums[i][j]);
    }
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < vectors; ++j)
      sums[i][j].store(c + i * c_row + j * kVec);
}

// Of m rows, at most `rows`.
template <int64_t rows, int64_t vectors>
inline void multiply_at_most(
    int64_t m, int64_t k, Left a, const float* b, int64_t b_row, float* c, int64_t c_row, bool add) {
  if constexpr (rows > 0) {
    if (m == rows)
      multiply_block<rows, vectors>(k, a, b, b_row, c, c_row, add);
    else
      multiply_at_most<rows - 1, vectors>(m, k, a, b, b_row, c, c_row, add);
  }
}

// `columns` columns of a product.
template <int64_t columns>
C10_ALWAYS_INLINE void multiply_columns(
    int64_t m, int64_t k, Left a, const float* b, int64_t b_row, float* c, int64_t c_row, bool add) {
  const int64_t blocks = (m + kRows - 1) / kRows;
  alignas(64) float panel[kPanel * columns];
  if (blocks >= kBlocksWorthCopying && k <= kPanel) {
    for (int64_t p = 0; p < k; ++p)
      for (int64_t j = 0; j < columns; j += kVec)
        Vec::loadu(b + p * b_row + j).store(panel + p * columns + j);
    b = panel;
    b_row = columns;
  }
  // 16 rows are 6, 5 and 5: a last block of few would not hide the latency of its sums.
  for (int64_t block = 0, i = 0; block < blocks; ++block) {
    const int64_t rows = m / blocks + (block < m % blocks);
    multiply_at_most<kRows, columns / kVec>(rows, k, a.at(i, 0), b, b_row, c + i * c_row, c_row, add);
    i += rows;
  }
}

// C (m, n) = A (m, k) B (k, n), plus C if `add`. n is a multiple of kColumns. Every element is summed in the order of k,
// whatever m and n are: cutting a product into blocks changes no bit.
inline void multiply(
    int64_t m, int64_t n, int64_t k, Left a, const float* b, int64_t b_row, float* c, int64_t c_row, bool add) {
  int64_t j = 0;
  for (; j + kWide <= n; j += kWide)
    multiply_columns<kWide>(m, k, a, b + j, b_row, c + j, c_row, add);
  if (kWide > kColumns && j < n)
    multiply_columns<kColumns>(m, k, a, b + j, b_row, c + j, c_row, add);
}

// The three products in which a lower triangle, diagonal included, takes part; what lies above it is not computed, or
// taken for zero where it is read. Rows go in bands of kColumns.

// C (m, m): its lower triangle, and some of what lies above, of A (m, k) B (k, m).
inline void multiply_into_triangle(
    int64_t m, int64_t k, Left a, const float* b, int64_t b_row, float* c, int64_t c_row) {
  for (int64_t i = 0; i < m; i += kColumns)
    multiply(std::min(kColumns, m - i), i + kColumns, k, a.at(i, 0), b, b_row, c + i * c_row, c_row, false);
}

// C (m, n) += A (m, m) B (m, n), with A lower triangular; zeros must fill the diagonal bands of A.
inline void multiply_triangle(
    int64_t m, int64_t n, Left a, const float* b, int64_t b_row, float* c, int64_t c_row) {
  for (int64_t i = 0; i < m; i += kColumns) {
    const int64_t end = std::min(i + kColumns, m);
    multiply(end - i, n, end, a.at(i, 0), b, b_row, c + i * c_row, c_row, true);
  }
}

// C (m, n) += A^T B, of the same A.
inline void multiply_triangle_transposed(
    int64_t m, int64_t n, Left a, const float* b, int64_t b_row, float* c, int64_t c_row) {
  for (int64_t j = 0; j < m; j += kColumns) {
    const int64_t rows = std::min(kColumns, m - j);
    multiply(rows, n, m - j, a.at(j, j).transposed(), b + j * b_row, b_row, c + j * c_row, c_row, true);
  }
}

} // namespace packc
