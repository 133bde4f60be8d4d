// Depthwise causal convolution over documents, optionally followed by SiLU, and its backward.
//
//   pre[t] = bias + sum_k weight[k] x[t - (W - 1) + k],   out[t] = pre[t] or silu(pre[t])
//
// where x before a document's first token is that document's initial state, or zero. Work is cut into chunks of tokens
// times blocks of channels; a chunk is walked in tiles that begin and end with documents, so every tile has the same
// form: W - 1 rows of history, then its tokens. All arithmetic is fp32. Chunks have a fixed size and their sums are
// added in order: results do not depend on the number of threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <tuple>
#include <vector>

#include "documents.h"
#include "sigmoid.h"
#include "tile.h"

namespace packc {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kConvolutionChunk = 256; // tokens
constexpr int64_t kTile = 16; // tokens of a tile, whose arrays together fit the second-level cache
constexpr int64_t kChannels = 512; // of a block: rows are long runs of memory, as hardware prefetchers like them

// The parameters in fp32 with rows of whole vectors: W rows of taps, then the bias.
struct Filter {
  int64_t D, W, width;
  std::vector<float> rows;

  Filter(const Tensor& weight, const OptionalTensor& bias)
      : D(weight.size(0)), W(weight.size(1)), width(whole_vectors(D)), rows((W + 1) * width, 0.f) {
    const Tensor taps = weight.to(at::kFloat).contiguous();
    const float* source = taps.const_data_ptr<float>();
    for (int64_t d = 0; d < D; ++d)
      for (int64_t k = 0; k < W; ++k)
        rows[k * width + d] = source[d * W + k];
    if (bias) {
      const Tensor offset = bias->to(at::kFloat).contiguous();
      std::copy_n(offset.const_data_ptr<float>(), D, rows.data() + W * width);
    }
  }
};

// A filter's rows from one channel on. A value, so that loops keep it in registers: any store of vectors might change
// what lies behind a reference.
template <int kW>
struct Taps {
  const float* rows;
  int64_t stride, runtime_W;

  Taps(const Filter& filter, int64_t channel)
      : rows(filter.rows.data() + channel), stride(filter.width), runtime_W(filter.W) {}
  int64_t W() const {
    return kW ? kW : runtime_W;
  }
  Vec tap(int64_t k, int64_t v) const {
    return Vec::loadu(rows + k * stride + v);
  }
  Vec bias(int64_t v) const {
    return tap(W(), v);
  }
};

// (N, D, W - 1) as fp32; element (n, i, d) of an absent one is never read.
struct State {
  Tensor tensor;

  explicit State(const OptionalTensor& given) {
    if (given)
      tensor = given->to(at::kFloat);
  }
  explicit operator bool() const {
    return tensor.defined();
  }
  // The rows [row, ...) of a document's state from a channel on, as a block of tokens.
  Block<const float> rows(int64_t document, int64_t row, int64_t channel) const {
    return Block<const float>{
        tensor.const_data_ptr<float>() + document * tensor.stride(0), tensor.stride(2), tensor.stride(1)}
        .at(row, channel);
  }
};

// Tokens [begin, end) of a document, counted from its first one.
struct Span {
  int64_t document, begin, end;
};

// Calls body(span) for the documents, or parts of them, within tokens [begin, end).
template <typename Body>
void for_each_span(const Documents& documents, int64_t begin, int64_t end, const Body& body) {
  for (int64_t n = documents.of(begin); begin < end; ++n) {
    const int64_t start = documents.starts[n], stop = std::min(end, documents.starts[n + 1]);
    if (begin < stop)
      body(Span{n, begin - start, stop - start});
    begin = std::max(begin, stop);
  }
}

// Rows of vectors that kernels read: a staged tile, or the tensor itself.
struct Rows {
  const float* data;
  int64_t stride;
};

// Whether the tensor's own rows will do.
inline bool readable_in_place(const Tensor& x) {
  return x.scalar_type() == at::kFloat && x.stride(2) == 1 && x.size(2) % kVec == 0;
}

// The tokens of a document as a block, from a token and a channel on.
template <typename T>
Block<const T> tokens_of(const Tensor& x, const Documents& documents, int64_t document, int64_t token, int64_t channel) {
  return Block<const T>{x.const_data_ptr<T>() + documents.offset(document, x), x.stride(1), x.stride(2)}.at(
      token, channel);
}

// Rows [begin - (W - 1), end) of a document: its tokens, and before its first one the initial state or zeros.
template <typename T>
void load_with_history(
    const Tensor& x, const Documents& documents, const State& initial, int64_t W, Span span, int64_t channel,
    int64_t channels, float* tile) {
  int64_t first = span.begin - (W - 1);
  if (first < 0) {
    const int64_t rows = std::min(-first, W - 1 - span.begin);
    if (initial)
      load_tile(initial.rows(span.document, span.begin, channel), rows, channels, tile, kChannels);
    else
      std::fill_n(tile, rows * kChannels, 0.f);
    tile += rows * kChannels;
    first = 0;
  }
  load_tile(tokens_of<T>(x, documents, span.document, first, channel), span.end - first, channels, tile, kChannels);
}

// bias + sum_k taps[k] x[k] for one vector of channels; x points to the oldest row.
template <int kW>
inline Vec convolve(Taps<kW> taps, int64_t v, const float* x, int64_t stride) {
  Vec sum = taps.bias(v);
  for (int64_t k = 0; k < taps.W(); ++k)
    sum = at::vec::fmadd(taps.tap(k, v), Vec::loadu(x + k * stride + v), sum);
  return sum;
}

} // namespace packc
