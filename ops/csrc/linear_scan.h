// What the linear scan's forward and backward share: how the work is cut, and how rows of channels are walked.
//
//   h[t] = a[t] h[t-1] + b[t]
//
// for each channel. A unit of work is a group of documents times a range of channels. It walks the tokens in pieces of
// at most 16, which stay in the caches, so that memory is read and written once: in place if all tensors have one
// dtype and channels that lie side by side, else by fp32 tiles. Channels are independent and a piece belongs to one
// document: results depend neither on the cut nor on the number of threads, and nothing of two documents ever meets.
#pragma once

#include <ATen/ops/empty.h>

#include <initializer_list>
#include <optional>
#include <vector>

#include "documents.h"
#include "tasks.h"
#include "tile.h"

namespace packc {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Tokens; the state that leaves every whole chunk of a row is kept for the backward.
constexpr int64_t kLinearScanChunk = 16;
constexpr int64_t kPair = 2 * kVec; // channels computed at once: a vector of a 16-bit dtype
constexpr int64_t kBlock = 2048; // channels of a tile: long rows are read faster than many short ones
constexpr int64_t kRange = 4096; // channels of a task, at most
constexpr int64_t kLine = 32; // channels of a task are a multiple: no two tasks write to one cache line
constexpr int64_t kGroupTokens = 1024; // a group of documents has at least so many tokens

// The part of a document that lies in one chunk of a row.
struct Piece {
  int64_t document, row, begin, length;
  bool first, last; // of its document

  bool ends_chunk() const {
    return (begin + length) % kLinearScanChunk == 0;
  }
};

using Group = std::vector<Piece>;

// Consecutive documents, gathered until they have enough tokens to be a task.
inline std::vector<Group> groups_of(const Documents& documents) {
  std::vector<Group> groups;
  int64_t room = 0;
  for (int64_t n = 0; n < documents.count(); ++n) {
    if (documents.length(n) == 0)
      continue;
    if (room <= 0) {
      groups.emplace_back();
      room = kGroupTokens;
    }
    room -= documents.length(n);
    const int64_t start = documents.packed ? documents.starts[n] : 0, end = start + documents.length(n);
    for (int64_t t = start; t < end;) {
      const int64_t stop = std::min(end, (t / kLinearScanChunk + 1) * kLinearScanChunk);
      groups.back().push_back({n, documents.packed ? 0 : n, t, stop - t, t == start, stop == end});
      t = stop;
    }
  }
  return groups;
}

// The states that leave the whole chunks of rows: (B, L / 16, D), flat. The tail of a row that fills no chunk has none.
struct ChunkStates {
  float* data;
  int64_t of_row, channels;

  ChunkStates(const Tensor& flat, const Tensor& x)
      : data(const_cast<float*>(flat.const_data_ptr<float>())),
        of_row(x.size(1) / kLinearScanChunk),
        channels(x.size(2)) {}

  // The state that leaves the token in front of `token`, a multiple of 16.
  float* before(int64_t row, int64_t token) const {
    return data + (row * of_row + token / kLinearScanChunk - 1) * channels;
  }
};

// (documents, D) in fp32, contiguous; or none.
struct DocumentStates {
  float* data;
  int64_t channels;

  DocumentStates(const OptionalTensor& x, int64_t channels)
      : data(x && x->numel() ? const_cast<float*>(x->const_data_ptr<float>()) : nullptr), channels(channels) {}

  explicit operator bool() const {
    return data != nullptr;
  }
  float* of(int64_t document) const {
    return data + document * channels;
  }
  // Into a tile's row: zeros where there are no states.
  void load(int64_t document, int64_t first, int64_t count, float* out) const {
    if (data)
      std::copy_n(of(document) + first, count, out);
    else
      std::fill_n(out, count, 0.f);
  }
};

// An empty document ends as it began.
inline void hand_on_states(const Documents& documents, const DocumentStates& from, const DocumentStates& to) {
  for (int64_t n = 0; n < documents.count(); ++n)
    if (to && documents.length(n) == 0)
      from.load(n, 0, to.channels, to.of(n));
}

// ---- rows of channels -----------------------------------------------------------------------------------------------

struct Pair {
  Vec low, high;
};

inline Pair operator*(const Pair& x, const Pair& y) {
  return {x.low * y.low, x.high * y.high};
}
inline Pair operator+(const Pair& x, const Pair& y) {
  return {x.low + y.low, x.high + y.high};
}
inline Pair fmadd(const Pair& x, const Pair& y, const Pair& z) {
  return {at::vec::fmadd(x.low, y.low, z.low), at::vec::fmadd(x.high, y.high, z.high)};
}

// n values, zeros behind them.
template <typename T>
inline Pair load(const T* x, int64_t n = kPair) {
  if (n < kPair) {
    float values[kPair] = {};
    load_run(x, n, values);
    return load(values);
  }
  if constexpr (std::is_same_v<T, float>) {
    return {Vec::loadu(x), Vec::loadu(x + kVec)};
  } else {
    const auto [low, high] = at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(x));
    return {low, high};
  }
}

template <typename T>
inline void store(const Pair& pair, T* x, int64_t n = kPair) {
  if (n < kPair) {
    float values[kPair];
    store(pair, values);
    store_run(values, n, x);
  } else if constexpr (std::is_same_v<T, float>) {
    pair.low.store(x);
    pair.high.store(x + kVec);
  } else {
    at::vec::convert_from_float<T>(pair.low, pair.high).store(x);
  }
}

// body(channel, how many)
template <typename Body>
inline void for_each_pair(int64_t channels, const Body& body) {
  int64_t c = 0;
  for (; c + kPair <= channels; c += kPair)
    body(c, kPair);
  if (c < channels)
    body(c, channels - c);
}

// Tokens whose channels lie side by side.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;

  T* operator[](int64_t token) const {
    return data + token * stride;
  }
};

// A piece of a (B, L, D) tensor from some channel on, in its own memory.
template <typename T>
Rows<T> rows(const Tensor& x, const Piece& piece, int64_t channel) {
  T* data = static_cast<T*>(const_cast<void*>(x.const_data_ptr()));
  return {data + piece.row * x.stride(0) + piece.begin * x.stride(1) + channel, x.stride(1)};
}

inline bool side_by_side(std::initializer_list<Tensor> tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [&](const Tensor& x) {
    return x.stride(2) == 1 && x.scalar_type() == tensors.begin()->scalar_type();
  });
}

// A piece of any tensor in fp32, a block of its channels at a time.
class Tile {
 public:
  Rows<float> rows() {
    values_.resize(kLinearScanChunk * kWidth);
    return {values_.data(), kWidth};
  }
  Rows<float> load(const Tensor& x, const Piece& piece, int64_t first, int64_t count) {
    const Rows<float> tile = rows();
    with_dtype(x.scalar_type(), [&](auto zero) {
      load_tile(block<const decltype(zero)>(x, piece, first), piece.length, count, tile.data, tile.stride);
    });
    return tile;
  }
  void store(const Tensor& x, const Piece& piece, int64_t first, int64_t count) const {
    with_dtype(x.scalar_type(), [&](auto zero) {
      store_tile(values_.data(), kWidth, piece.length, count, block<decltype(zero)>(x, piece, first));
    });
  }

 private:
  // Rows a power of two apart would share a few lines of the cache.
  static constexpr int64_t kWidth = kBlock + kPair;

  template <typename T>
  static Block<T> block(const Tensor& x, const Piece& piece, int64_t first) {
    T* data = static_cast<T*>(const_cast<void*>(x.const_data_ptr()));
    return Block<T>{data + piece.row * x.stride(0), x.stride(1), x.stride(2)}.at(piece.begin, first);
  }

  std::vector<float> values_;
};

// A token and channel is read and written in the time of so many multiplications.
constexpr int64_t kMemory = 8;

// body(worker, group, first channel, end) for all groups and ranges of channels, in parallel.
template <typename Make, typename Body>
void for_each_range(const std::vector<Group>& groups, int64_t channels, const Make& make, const Body& body) {
  const int64_t count = static_cast<int64_t>(groups.size());
  // Groups differ in length: then there must be more tasks than threads for all to end together. Wide ranges are read
  // faster.
  int64_t tokens = 0;
  for (const Group& group : groups)
    for (const Piece& piece : group)
      tokens += piece.length;
  const int64_t threads = threads_for(kMemory * tokens * channels);
  const int64_t wanted = threads * (count > 1 ? 2 : 1), share = channels * count / wanted;
  const int64_t size = std::clamp(share / kLine * kLine, kLine, kRange);
  const int64_t ranges = (channels + size - 1) / size;
  for_each_task(threads, count * ranges, make, [&](int64_t task, auto& worker) {
    const int64_t first = task % ranges * size;
    body(worker, groups[task / ranges], first, std::min(first + size, channels));
  });
}

} // namespace packc
