// Documents as the kernels see them: offsets into the tokens 0 .. B * L, from cu_seqlens or, without it, the batch rows.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

namespace packc {

struct Documents {
  bool packed;
  std::vector<int64_t> starts; // (N + 1,)

  Documents(const std::optional<at::Tensor>& cu_seqlens, int64_t B, int64_t L) : packed(cu_seqlens.has_value()) {
    if (!cu_seqlens) {
      for (int64_t b = 0; b <= B; ++b)
        starts.push_back(b * L);
      return;
    }
    const at::Tensor offsets = cu_seqlens->to(at::kLong).contiguous();
    starts.assign(offsets.const_data_ptr<int64_t>(), offsets.const_data_ptr<int64_t>() + offsets.numel());
    TORCH_CHECK_VALUE(
        B == 1 && !starts.empty() && starts.front() == 0 && starts.back() == L &&
            std::is_sorted(starts.begin(), starts.end()),
        "cu_seqlens must rise from 0 to L = ", L, ", not ", starts);
  }

  int64_t count() const {
    return static_cast<int64_t>(starts.size()) - 1;
  }
  int64_t tokens() const {
    return starts.back();
  }
  int64_t length(int64_t document) const {
    return starts[document + 1] - starts[document];
  }
  // The document that holds a token: the last one that begins at or before it, so never an empty one.
  int64_t of(int64_t token) const {
    return std::upper_bound(starts.begin(), starts.end(), token) - starts.begin() - 1;
  }
  // Where a document's first token lies in a (B, L, ...) tensor's memory, whatever its strides.
  int64_t offset(int64_t document, const at::Tensor& x) const {
    return packed ? starts[document] * x.stride(1) : document * x.stride(0);
  }
};

} // namespace packc
