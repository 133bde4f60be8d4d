// What a batch is asked before it is packed, and the index it is packed by: packc/facts.py says in plain torch what
// the columns mean. A dozen small ops are one walk over mask and labels here.

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

namespace packc {
namespace {

using at::Tensor;
using Flags = std::vector<uint8_t>; // of B * L positions, row by row
// Bytes may alias whatever they are written beside, and a loop that reloads all of it is no vector loop.
using Bytes = uint8_t* __restrict__;

template <typename Body>
void for_values(const Tensor& x, const Flags& positions, const Body& body) {
  TORCH_CHECK_VALUE(x.numel() == static_cast<int64_t>(positions.size()), "not one value a position: ", x.sizes());
  const Tensor values = x.contiguous();
  AT_DISPATCH_ALL_TYPES_AND3(at::kBool, at::kHalf, at::kBFloat16, values.scalar_type(), "facts", [&] {
    body(values.const_data_ptr<scalar_t>());
  });
}

struct Extent { // first, one past the last, and how many; nothing where there is none
  int64_t first = 0, end = 0, count = 0;

  Extent(const uint8_t* row, int64_t length) {
    const auto* found = static_cast<const uint8_t*>(std::memchr(row, 1, length));
    if (!found)
      return;
    first = found - row;
    for (end = length; !row[end - 1];)
      --end;
    for (int64_t l = first; l < end; ++l)
      count += row[l];
  }
};

// Where a label counts, in rows of length L: each is that of a position so many ahead.
void add_live(Flags& live, int64_t L, at::TensorList labels, at::IntArrayRef ignored, at::IntArrayRef ahead) {
  for (size_t n = 0; n < labels.size(); ++n)
    for_values(labels[n], live, [&](const auto* x) {
      using Value = std::decay_t<decltype(*x)>;
      // Integers are compared as such, a bool among them, as torch does.
      using Number = std::conditional_t<std::is_integral_v<Value>, int64_t, Value>;
      const auto ignore = static_cast<Number>(ignored[n]);
      const auto positions = static_cast<int64_t>(live.size());
      for (int64_t row = 0; row < positions; row += L) {
        const auto* label = x + row + ahead[n];
        const Bytes counts = live.data() + row;
        for (int64_t l = 0; l < L - ahead[n]; ++l)
          counts[l] |= static_cast<Number>(label[l]) != ignore;
      }
    });
}

// (B, 7): the fields of OfRows.
Tensor batch_facts(
    const Tensor& mask, at::TensorList labels, at::IntArrayRef ignored, at::IntArrayRef ahead, at::TensorList inside) {
  const int64_t B = mask.size(0), L = mask.size(1);
  Flags real(B * L), live(labels.empty() ? 0 : B * L);
  std::vector<uint8_t> other(B), beyond(B);
  for_values(mask, real, [&, B, L](const auto* x) {
    for (int64_t b = 0; b < B; ++b, x += L) {
      const Bytes row = real.data() + b * L;
      uint8_t odd = 0;
      for (int64_t l = 0; l < L; ++l) {
        row[l] = x[l] != 0;
        odd |= (x[l] != 0) & (x[l] != 1);
      }
      other[b] = odd;
    }
  });
  add_live(live, L, labels, ignored, ahead);
  for (const Tensor& mask_inside : inside)
    for_values(mask_inside, real, [&, B, L](const auto* x) {
      for (int64_t b = 0; b < B; ++b, x += L) {
        uint8_t some = 0;
        for (int64_t l = 0; l < L; ++l)
          some |= (x[l] != 0) & !real[b * L + l];
        beyond[b] |= some;
      }
    });
  Tensor facts = at::empty({B, 7}, at::kLong);
  auto* fact = facts.mutable_data_ptr<int64_t>();
  for (int64_t b = 0; b < B; ++b) {
    const Extent tokens(&real[b * L], L);
    const Extent counting = live.empty() ? Extent(nullptr, 0) : Extent(&live[b * L], L);
    const int64_t first_label = counting.end == 0 ? L : counting.first;
    for (int64_t value : {tokens.first, tokens.end, tokens.count, int64_t{other[b]}, first_label, counting.end,
                          int64_t{beyond[b]}})
      *fact++ = value;
  }
  return facts;
}

enum class Walk { kRisingPositions, kPositions, kNumbers, kOffsets };

bool begins_document(Walk walk, int64_t before, int64_t value) {
  if (walk == Walk::kRisingPositions)
    return value <= before;
  return walk == Walk::kPositions ? value < before : value != before;
}

// Boundaries as starts() of packc/boundaries.py says: each by how it is to be walked, which of them have one name, and
// whether they are positions of the model's own. moved: labels of next tokens.
// -> (K, 2): row and position of each token that begins a document behind another one; across, gaps, elsewhere,
// disagree, not_offsets.
std::tuple<Tensor, std::vector<int64_t>> batch_documents(
    const Tensor& mask, at::TensorList given, at::IntArrayRef walks, at::IntArrayRef names,
    at::IntArrayRef of_model, at::TensorList moved, at::IntArrayRef ignored, at::IntArrayRef ahead) {
  const int64_t B = mask.size(0), L = mask.size(1), places = B * L;
  Flags real(places), begins(places), of_positions(places), live(places);
  std::vector<Flags> found;
  bool gaps = false, disagree = false, not_offsets = false;
  for_values(mask, real, [&](const auto* x) {
    for (int64_t i = 0; i < places; ++i)
      real[i] = x[i] != 0;
  });
  for (size_t n = 0; n < given.size(); ++n) {
    const auto walk = static_cast<Walk>(walks[n]);
    const Tensor values = given[n].to(at::kLong).contiguous();
    const auto* value = values.const_data_ptr<int64_t>();
    Flags own(places);
    if (walk == Walk::kOffsets) {
      const int64_t count = values.numel();
      const bool rising = value[0] == 0 && value[count - 1] == places && std::is_sorted(value, value + count);
      not_offsets |= !rising;
      for (int64_t k = 0; k < count && rising; ++k) {
        const int64_t row = value[k] / L * L;
        if (value[k] == row || !std::memchr(&real[row], 1, value[k] - row))
          continue; // no token before it
        if (const void* next = std::memchr(&real[value[k]], 1, row + L - value[k]))
          own[static_cast<const uint8_t*>(next) - real.data()] = 1;
      }
    }
    for (int64_t b = 0; b < B && walk != Walk::kOffsets; ++b) {
      const int64_t* row = values.size(0) == 1 ? value : value + b * L;
      bool behind = false;
      for (int64_t l = 0, before = 0; l < L; ++l) {
        const int64_t i = b * L + l, here = row[l];
        if (!real[i])
          continue;
        own[i] = behind && begins_document(walk, before, here);
        gaps |= behind && of_model[n] && here - before > 1;
        before = here;
        behind = true;
      }
    }
    const auto said = [](const Flags& flags) { return std::find(flags.begin(), flags.end(), 1) != flags.end(); };
    const size_t first = std::find(names.begin(), names.end(), names[n]) - names.begin();
    const bool both = (said(begins) && said(own)) || (first < n && own != found[first]);
    disagree |= both && own != begins;
    for (int64_t i = 0; i < places; ++i) {
      begins[i] |= own[i];
      of_positions[i] |= own[i] && of_model[n];
    }
    found.push_back(std::move(own));
  }
  add_live(live, L, moved, ignored, ahead);
  std::vector<int64_t> where;
  bool across = false, elsewhere = false;
  for (auto at = begins.begin(); (at = std::find(at, begins.end(), 1)) != begins.end(); ++at) {
    const int64_t i = at - begins.begin(); // never a row's first position
    where.insert(where.end(), {i / L, i % L});
    across |= live[i - 1];
    elsewhere |= !of_positions[i];
  }
  Tensor result = at::empty({static_cast<int64_t>(where.size()) / 2, 2}, at::kLong);
  std::copy(where.begin(), where.end(), result.mutable_data_ptr<int64_t>());
  return {result, {across, gaps, elsewhere, disagree, not_offsets}};
}

// The spans of B rows; begins (K, 2): row and position of documents that begin within one.
// -> index (T,), and the offsets of all documents as int32 and int64.
std::tuple<Tensor, Tensor, Tensor> batch_index(
    at::IntArrayRef starts, at::IntArrayRef stops, const Tensor& begins, int64_t length) {
  const int64_t B = starts.size(), within = begins.size(0), offsets = B + within + 1;
  Tensor wide = at::empty({offsets}, at::kLong), narrow = at::empty({offsets}, at::kInt);
  auto* offset = wide.mutable_data_ptr<int64_t>();
  offset[0] = 0;
  for (int64_t b = 0; b < B; ++b)
    offset[b + 1] = offset[b] + stops[b] - starts[b];
  Tensor index = at::empty({offset[B]}, at::kLong);
  auto* place = index.mutable_data_ptr<int64_t>();
  for (int64_t b = 0; b < B; ++b)
    std::iota(place + offset[b], place + offset[b + 1], b * length + starts[b]);
  if (within) {
    const Tensor where = begins.contiguous();
    const auto* at = where.const_data_ptr<int64_t>();
    for (int64_t n = 0; n < within; ++n)
      offset[B + 1 + n] = offset[at[2 * n]] + at[2 * n + 1] - starts[at[2 * n]];
    std::sort(offset, offset + offsets);
  }
  std::copy_n(offset, offsets, narrow.mutable_data_ptr<int32_t>());
  return {index, narrow, wide};
}

TORCH_LIBRARY_FRAGMENT(packc_batch, library) {
  library.def("facts", torch::dispatch(c10::kCPU, TORCH_FN(batch_facts)));
  library.def("documents", torch::dispatch(c10::kCPU, TORCH_FN(batch_documents)));
  library.def("index", torch::dispatch(c10::kCPU, TORCH_FN(batch_index)));
}

} // namespace
} // namespace packc
