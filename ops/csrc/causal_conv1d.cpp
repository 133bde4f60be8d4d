// Depthwise causal convolution over documents, optionally followed by SiLU, and its backward.
//
//   pre[t] = bias + sum_k weight[k] x[t - (W - 1) + k],   out[t] = pre[t] or silu(pre[t])
//
// where x before a document's first token is that document's initial state, or zero. Work is cut into chunks of tokens
// times blocks of channels; a chunk is walked in tiles that begin and end with documents, so every tile has the same
// form: W - 1 rows of history, then its tokens. All arithmetic is fp32. Chunks have a fixed size and their sums are
// added in order: results do not depend on the number of threads.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "documents.h"
#include "sigmoid.h"
#include "tile.h"

namespace packc {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kChunk = 256; // tokens
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
bool readable_in_place(const Tensor& x) {
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

// ---- forward ---------------------------------------------------------------------------------------------------------

template <int kW, bool kSilu>
void forward_tile(Taps<kW> taps, int64_t width, int64_t tokens, Rows x, float* out, int64_t out_stride) {
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t v = 0; v < width; v += kVec) {
      const Vec pre = convolve(taps, v, x.data + t * x.stride, x.stride);
      (kSilu ? silu(pre) : pre).store(out + t * out_stride + v);
    }
  }
}

template <typename T, int kW, bool kSilu>
void forward(const Tensor& x, const Filter& filter, const Documents& documents, const State& initial, Tensor& out) {
  const int64_t D = filter.D, W = filter.W, tokens = documents.tokens();
  const int64_t blocks = at::divup(D, kChannels), units = at::divup(tokens, kChunk) * blocks;
  const bool in_place = readable_in_place(x);
  at::parallel_for(0, units, 1, [&](int64_t first, int64_t last) {
    std::vector<float> rows((W - 1 + kTile) * kChannels), result(kTile * kChannels);

    const auto staged = [&](Taps<kW> taps, Span span, int64_t channel, int64_t channels) {
      for (int64_t t = span.begin; t < span.end; t += kTile) {
        const Span tile{span.document, t, std::min(t + kTile, span.end)};
        const int64_t count = tile.end - tile.begin;
        load_with_history<T>(x, documents, initial, W, tile, channel, channels, rows.data());
        forward_tile<kW, kSilu>(
            taps, whole_vectors(channels), count, Rows{rows.data(), kChannels}, result.data(), kChannels);
        const Block<T> target{out.mutable_data_ptr<T>() + (documents.starts[span.document] + t) * D + channel, D, 1};
        store_tile(result.data(), kChannels, count, channels, target);
      }
    };

    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t chunk = unit / blocks * kChunk, channel = unit % blocks * kChannels;
      const int64_t channels = std::min(kChannels, D - channel);
      const Taps<kW> taps(filter, channel);
      for_each_span(documents, chunk, std::min(chunk + kChunk, tokens), [&](Span span) {
        // Only a document's first W - 1 tokens look at rows that are not there.
        const int64_t head = in_place ? std::clamp(W - 1, span.begin, span.end) : span.end;
        staged(taps, Span{span.document, span.begin, head}, channel, channels);
        if constexpr (std::is_same_v<T, float>) {
          if (head < span.end)
            forward_tile<kW, kSilu>(
                taps, channels, span.end - head,
                Rows{tokens_of<T>(x, documents, span.document, head - (W - 1), channel).data, x.stride(1)},
                out.mutable_data_ptr<T>() + (documents.starts[span.document] + head) * D + channel, D);
        }
      });
    }
  });
}

// The last W - 1 rows of [initial state, tokens] of every document.
template <typename T>
void final_states(const Tensor& x, const Documents& documents, const State& initial, int64_t W, Tensor& state) {
  const int64_t D = x.size(2);
  at::parallel_for(0, documents.count(), 1, [&](int64_t first, int64_t last) {
    std::vector<float> rows((W - 1) * kChannels);
    for (int64_t n = first; n < last; ++n) {
      const int64_t length = documents.length(n);
      for (int64_t channel = 0; channel < D; channel += kChannels) {
        const int64_t channels = std::min(kChannels, D - channel);
        load_with_history<T>(
            x, documents, initial, W, Span{n, length, length}, channel, channels, rows.data());
        const Block<float> target{state.mutable_data_ptr<float>() + (n * D + channel) * (W - 1), 1, W - 1};
        store_tile(rows.data(), kChannels, W - 1, channels, target);
      }
    }
  });
}

// ---- backward --------------------------------------------------------------------------------------------------------

// dpre = dout, or dout silu'(pre) with pre computed again.
template <int kW, bool kSilu>
void preactivation_grads(
    Taps<kW> taps, int64_t width, int64_t tokens, Rows x, Rows dout, float* dpre) {
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t v = 0; v < width; v += kVec) {
      Vec grad = Vec::loadu(dout.data + t * dout.stride + v);
      if constexpr (kSilu) {
        const Vec pre = convolve(taps, v, x.data + t * x.stride, x.stride), s = sigmoid(pre);
        // silu' = s (1 + pre (1 - s))
        grad = grad * s * at::vec::fmadd(pre, Vec(1.f) - s, Vec(1.f));
      }
      grad.store(dpre + t * kChannels + v);
    }
  }
}

// The gradients of kTaps taps from tap k on (and of the bias, with the first): sums[k] += sum_t dpre[t] x[t + k].
template <int kTaps, bool kBias>
void parameter_grads(
    int64_t k, int64_t width, int64_t tokens, Rows x, const float* dpre, float* sums, float* bias_sums,
    int64_t sums_width) {
  for (int64_t v = 0; v < width; v += kVec) {
    Vec taps[kTaps], bias(0.f);
    for (int i = 0; i < kTaps; ++i)
      taps[i] = Vec(0.f);
    for (int64_t t = 0; t < tokens; ++t) {
      const Vec grad = Vec::loadu(dpre + t * kChannels + v);
      for (int i = 0; i < kTaps; ++i)
        taps[i] = at::vec::fmadd(grad, Vec::loadu(x.data + (t + k + i) * x.stride + v), taps[i]);
      bias = bias + grad;
    }
    for (int i = 0; i < kTaps; ++i) {
      float* sum = sums + (k + i) * sums_width + v;
      (Vec::loadu(sum) + taps[i]).store(sum);
    }
    if constexpr (kBias)
      (Vec::loadu(bias_sums + v) + bias).store(bias_sums + v);
  }
}

// dx[t] = sum_k taps[W - 1 - k] dpre[t + k]
template <int kW>
void input_grads(Taps<kW> taps, int64_t width, int64_t tokens, const float* dpre, float* dx, int64_t dx_stride) {
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t v = 0; v < width; v += kVec) {
      Vec sum(0.f);
      for (int64_t k = 0; k < taps.W(); ++k)
        sum = at::vec::fmadd(taps.tap(taps.W() - 1 - k, v), Vec::loadu(dpre + (t + k) * kChannels + v), sum);
      sum.store(dx + t * dx_stride + v);
    }
  }
}

struct Grads {
  Tensor dx; // (B, L, D)
  Tensor sums; // (chunks, W + 1, D in whole vectors): the taps' and the bias' share of each chunk
  Tensor dinitial; // (N, D, W - 1), or undefined
};

template <typename T, int kW, bool kSilu>
void backward(
    const Tensor& dout, const State& dfinal, const Tensor& x, const Filter& filter, const Documents& documents,
    const State& initial, Grads& grads) {
  const int64_t D = filter.D, W = filter.W, tokens = documents.tokens();
  const bool x_in_place = readable_in_place(x), dout_in_place = readable_in_place(dout);
  const int64_t blocks = at::divup(D, kChannels), units = at::divup(tokens, kChunk) * blocks;
  at::parallel_for(0, units, 1, [&](int64_t first, int64_t last) {
    std::vector<float> rows((kTile + 2 * (W - 1)) * kChannels), result((kTile + W - 1) * kChannels);
    // dpre of a tile, with W - 1 rows on either side: those before a document's first token are zero.
    std::vector<float> padded((kTile + 2 * (W - 1)) * kChannels);
    float* dpre = padded.data() + (W - 1) * kChannels;
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t chunk = unit / blocks * kChunk, channel = unit % blocks * kChannels;
      const int64_t channels = std::min(kChannels, D - channel), width = whole_vectors(channels);
      const Taps<kW> taps(filter, channel);
      float* sums = grads.sums.mutable_data_ptr<float>() + unit / blocks * (W + 1) * filter.width + channel;

      // Computes dpre of a tile; returns its rows of x.
      const auto load_dpre = [&](Span tile) {
        const int64_t count = tile.end - tile.begin;
        Rows x_rows{rows.data(), kChannels}, dout_rows{result.data(), kChannels};
        const auto dout_block = tokens_of<T>(dout, documents, tile.document, tile.begin, channel);
        if constexpr (std::is_same_v<T, float>) {
          if (x_in_place && tile.begin >= W - 1)
            x_rows = {tokens_of<T>(x, documents, tile.document, tile.begin - (W - 1), channel).data, x.stride(1)};
          if (dout_in_place)
            dout_rows = {dout_block.data, dout.stride(1)};
        }
        if (x_rows.data == rows.data())
          load_with_history<T>(x, documents, initial, W, tile, channel, channels, rows.data());
        if (dout_rows.data == result.data())
          load_tile(dout_block, count, channels, result.data(), kChannels);
        preactivation_grads<kW, kSilu>(taps, width, count, x_rows, dout_rows, dpre);
        return x_rows;
      };

      for_each_span(documents, chunk, std::min(chunk + kChunk, tokens), [&](Span span) {
        const int64_t length = documents.length(span.document);
        // From the last tile to the first: each needs the first W - 1 rows of dpre of the one behind it. Those behind
        // the chunk are computed here once more; behind the document there is nothing.
        const int64_t behind = std::min(W - 1, length - span.end);
        if (behind > 0)
          load_dpre(Span{span.document, span.end, span.end + behind});
        std::fill_n(dpre + behind * kChannels, (W - 1 - behind) * kChannels, 0.f);
        const int64_t tiles = at::divup(span.end - span.begin, kTile);
        for (int64_t i = tiles - 1; i >= 0; --i) {
          const int64_t begin = span.begin + i * kTile;
          const Span tile{span.document, begin, std::min(begin + kTile, span.end)};
          const int64_t count = tile.end - tile.begin;
          std::copy_backward(dpre, dpre + (W - 1) * kChannels, dpre + (count + W - 1) * kChannels);
          const Rows x_rows = load_dpre(tile);

          float* bias_sums = sums + W * filter.width;
          if constexpr (kW > 0) {
            parameter_grads<kW, true>(0, width, count, x_rows, dpre, sums, bias_sums, filter.width);
          } else {
            parameter_grads<1, true>(0, width, count, x_rows, dpre, sums, bias_sums, filter.width);
            for (int64_t k = 1; k < W; ++k)
              parameter_grads<1, false>(k, width, count, x_rows, dpre, sums, bias_sums, filter.width);
          }

          T* dx = grads.dx.mutable_data_ptr<T>() + (documents.starts[span.document] + tile.begin) * D + channel;
          float* dx_rows = result.data();
          int64_t dx_stride = kChannels;
          if constexpr (std::is_same_v<T, float>) {
            if (width == channels) {
              dx_rows = dx;
              dx_stride = D;
            }
          }
          input_grads(taps, width, count, dpre, dx_rows, dx_stride);
          // Token p is row p - (length - (W - 1)) of the final state.
          if (dfinal) {
            for (int64_t p = std::max(tile.begin, length - (W - 1)); p < tile.end; ++p) {
              const auto row = dfinal.rows(span.document, p - (length - (W - 1)), channel);
              for (int64_t c = 0; c < channels; ++c)
                dx_rows[(p - tile.begin) * dx_stride + c] += row.data[c * row.channel_stride];
            }
          }
          if (dx_rows == result.data())
            store_tile(result.data(), kChannels, count, channels, Block<T>{dx, D, 1});
        }

        if (grads.dinitial.defined() && span.begin == 0) {
          std::fill_n(padded.data(), (W - 1) * kChannels, 0.f);
          input_grads(taps, width, W - 1, padded.data(), result.data(), kChannels);
          float* dstate = grads.dinitial.mutable_data_ptr<float>() + (span.document * D + channel) * (W - 1);
          for (int64_t c = 0; c < channels; ++c)
            for (int64_t i = 0; i < W - 1; ++i)
              dstate[c * (W - 1) + i] += result[i * kChannels + c];
        }
      });
    }
  });
}

// Documents shorter than W - 1 hand the end of their initial state on: final[i] = initial[i + length].
void states_handed_on(const State& dfinal, const Documents& documents, int64_t W, Tensor& dinitial) {
  const int64_t D = dinitial.size(1);
  for (int64_t n = 0; n < documents.count(); ++n) {
    const int64_t length = documents.length(n);
    for (int64_t i = 0; i + length < W - 1; ++i) {
      const auto row = dfinal.rows(n, i, 0);
      float* dstate = dinitial.mutable_data_ptr<float>() + n * D * (W - 1) + i + length;
      for (int64_t d = 0; d < D; ++d)
        dstate[d * (W - 1)] += row.data[d * row.channel_stride];
    }
  }
}

// The chunks' shares added in their order; (D, W) and (D,).
std::tuple<Tensor, Tensor> parameter_totals(const Tensor& sums, int64_t D) {
  const int64_t chunks = sums.size(0), row = sums.size(1) * sums.size(2);
  Tensor total = at::zeros({sums.size(1), sums.size(2)}, sums.options());
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const float* share = sums.const_data_ptr<float>() + chunk * row;
    float* out = total.mutable_data_ptr<float>();
    for (int64_t i = 0; i < row; i += kVec)
      (Vec::loadu(out + i) + Vec::loadu(share + i)).store(out + i);
  }
  total = total.slice(1, 0, D);
  const int64_t W = total.size(0) - 1;
  return {total.slice(0, 0, W).t(), total.select(0, W)};
}

// ---- dispatcher functions --------------------------------------------------------------------------------------------

void check_shapes(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& initial, int64_t N) {
  const int64_t D = x.size(2), W = weight.size(1);
  TORCH_CHECK_VALUE(weight.size(0) == D, "weight must be (D, W) with D = ", D, ", not ", weight.sizes());
  TORCH_CHECK_VALUE(!bias || bias->sizes() == at::IntArrayRef({D}), "bias must be (", D, ",), not ", bias->sizes());
  TORCH_CHECK_VALUE(
      !initial || initial->sizes() == at::IntArrayRef({N, D, W - 1}),
      "initial_state must be (N, D, W - 1) = (", N, ", ", D, ", ", W - 1, "), not ", initial->sizes());
}

// Calls body with the width and the activation as compile-time constants; 0 stands for a width of any size.
template <typename Body>
void with_constants(int64_t W, bool silu, const Body& body) {
  const auto with_width = [&](auto activation) {
    switch (W) {
      case 2:
        return body(std::integral_constant<int, 2>(), activation);
      case 3:
        return body(std::integral_constant<int, 3>(), activation);
      case 4:
        return body(std::integral_constant<int, 4>(), activation);
      default:
        return body(std::integral_constant<int, 0>(), activation);
    }
  };
  silu ? with_width(std::true_type()) : with_width(std::false_type());
}

std::tuple<Tensor, Tensor> causal_conv1d(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool silu, const OptionalTensor& cu_seqlens,
    const OptionalTensor& initial_state, bool output_final_state) {
  const Documents documents(cu_seqlens, x.size(0), x.size(1));
  check_shapes(x, weight, bias, initial_state, documents.count());
  const Filter filter(weight, bias);
  const State initial(initial_state);
  Tensor out = at::empty(x.sizes(), x.options());
  Tensor state = at::empty(
      {output_final_state ? documents.count() : 0, filter.D, filter.W - 1}, x.options().dtype(at::kFloat));
  with_dtype(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    with_constants(filter.W, silu, [&](auto width, auto activation) {
      forward<T, width.value, activation.value>(x, filter, documents, initial, out);
    });
    if (output_final_state && filter.W > 1)
      final_states<T>(x, documents, initial, filter.W, state);
  });
  return {out, state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv1d_bwd(
    const Tensor& dout, const OptionalTensor& dfinal_state, const Tensor& x, const Tensor& weight,
    const OptionalTensor& bias, bool silu, const OptionalTensor& cu_seqlens, const OptionalTensor& initial_state) {
  const Documents documents(cu_seqlens, x.size(0), x.size(1));
  const int64_t N = documents.count();
  check_shapes(x, weight, bias, initial_state, N);
  const Filter filter(weight, bias);
  const State initial(initial_state), dfinal(dfinal_state);
  const auto fp32 = x.options().dtype(at::kFloat);
  Grads grads;
  grads.dx = at::empty(x.sizes(), x.options());
  grads.sums = at::zeros({at::divup(documents.tokens(), kChunk), filter.W + 1, filter.width}, fp32);
  if (initial) {
    grads.dinitial = at::zeros({N, filter.D, filter.W - 1}, fp32);
    if (dfinal)
      states_handed_on(dfinal, documents, filter.W, grads.dinitial);
  }
  with_dtype(x.scalar_type(), [&](auto zero) {
    with_constants(filter.W, silu, [&](auto width, auto activation) {
      backward<decltype(zero), width.value, activation.value>(dout, dfinal, x, filter, documents, initial, grads);
    });
  });
  const auto [dweight, dbias] = parameter_totals(grads.sums, filter.D);
  const auto none = [&] { return at::empty({0}, fp32); };
  return {
      grads.dx,
      dweight.to(weight.scalar_type()).contiguous(),
      bias ? dbias.to(bias->scalar_type(), false, true) : none(),
      initial ? grads.dinitial.to(initial_state->scalar_type()) : none()};
}

TORCH_LIBRARY_FRAGMENT(packc_cpu, m) {
  m.def(
      "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? cu_seqlens, Tensor? initial_state, "
      "bool output_final_state) -> (Tensor, Tensor)");
  m.def(
      "causal_conv1d_bwd(Tensor dout, Tensor? dfinal_state, Tensor x, Tensor weight, Tensor? bias, bool silu, "
      "Tensor? cu_seqlens, Tensor? initial_state) -> (Tensor, Tensor, Tensor, Tensor)");
  m.impl("causal_conv1d", c10::DispatchKey::CPU, TORCH_FN(causal_conv1d));
  m.impl("causal_conv1d_bwd", c10::DispatchKey::CPU, TORCH_FN(causal_conv1d_bwd));
}

} // namespace
} // namespace packc
