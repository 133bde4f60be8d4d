// Rows of memory gathered and scattered by an index, for any dtype: what packing and unpacking are on a CPU.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <functional>

namespace packc {
namespace {

using at::Tensor;

constexpr int64_t kBytes = 1 << 16; // of a task, so that short rows are not handed out one by one

int64_t grain(int64_t row_bytes) {
  return std::max<int64_t>(1, kBytes / std::max<int64_t>(1, row_bytes));
}

void check(const Tensor& index, int64_t rows) {
  const int64_t* at = index.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < index.numel(); ++t)
    TORCH_CHECK_INDEX(at[t] >= 0 && at[t] < rows, "index[", t, "] = ", at[t], " is not a place in ", rows, " tokens");
}

// (R, ...) -> (T, ...): row index[t] of x.
Tensor gather_rows(const Tensor& x, const Tensor& index) {
  const Tensor source = x.contiguous(), places = index.contiguous();
  check(places, source.size(0));
  auto sizes = source.sizes().vec();
  sizes[0] = places.numel();
  Tensor out = at::empty(sizes, source.options());
  const int64_t bytes = source.size(0) == 0 ? 0 : source.nbytes() / source.size(0);
  const auto* from = static_cast<const char*>(source.const_data_ptr());
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t* at = places.const_data_ptr<int64_t>();
  at::parallel_for(0, places.numel(), grain(bytes), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      std::memcpy(to + t * bytes, from + at[t] * bytes, bytes);
  });
  return out;
}

// (T, ...) -> (rows, ...): row t of x to row index[t], zero elsewhere.
Tensor scatter_rows(const Tensor& x, const Tensor& index, int64_t rows) {
  const Tensor source = x.contiguous(), places = index.contiguous();
  check(places, rows);
  auto sizes = source.sizes().vec();
  sizes[0] = rows;
  const int64_t tokens = places.numel();
  const int64_t* at = places.const_data_ptr<int64_t>();
  // Most of the output's memory may be padding: where the order of places tells it, each row is written once.
  const bool ascending = std::adjacent_find(at, at + tokens, std::greater_equal<int64_t>()) == at + tokens;
  Tensor out = ascending ? at::empty(sizes, source.options()) : at::zeros(sizes, source.options());
  const int64_t bytes = rows == 0 ? 0 : out.nbytes() / rows;
  const auto* from = static_cast<const char*>(source.const_data_ptr());
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  if (bytes == 0)
    return out;
  if (!ascending) {
    for (int64_t t = 0; t < tokens; ++t) // in order: of two rows for one place, the last stays
      std::memcpy(to + at[t] * bytes, from + t * bytes, bytes);
    return out;
  }
  at::parallel_for(0, rows, grain(bytes), [&](int64_t begin, int64_t end) {
    int64_t t = std::lower_bound(at, at + tokens, begin) - at;
    for (int64_t row = begin; row < end; ++row, ++t) {
      const int64_t next = t < tokens ? std::min(at[t], end) : end;
      std::memset(to + row * bytes, 0, (next - row) * bytes);
      row = next;
      if (row < end)
        std::memcpy(to + row * bytes, from + t * bytes, bytes);
    }
  });
  return out;
}

TORCH_LIBRARY_FRAGMENT(packc_cpu, library) {
  library.def("gather_rows", torch::dispatch(c10::kCPU, TORCH_FN(gather_rows)));
  library.def("scatter_rows", torch::dispatch(c10::kCPU, TORCH_FN(scatter_rows)));
}

} // namespace
} // namespace packc
