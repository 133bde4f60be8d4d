// The causal convolution's backward: the pre-activation again, then the gradients of inputs, taps, bias and states.
#pragma once

#include "causal_conv1d.h"

namespace packc {

// dpre = dout, or dout silu'(pre) with pre computed again.
template <int kW, bool kSilu>
void preactivation_grads(
    Taps<kW> taps, int64_t width, int64_t tokens, Rows x, Rows dout, float* dpre) {
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t v = 0; v < width; v += kVec) {
      Vec grad = Vec::loadu(dout.data + t * dout.stride + v);
      if constexpr (kSilu) {
        grad = grad * silu_slope(convolve(taps, v, x.data + t * x.stride, x.stride));
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
  const int64_t blocks = at::divup(D, kChannels), units = at::divup(tokens, kConvolutionChunk) * blocks;
  at::parallel_for(0, units, 1, [&](int64_t first, int64_t last) {
    std::vector<float> rows((kTile + 2 * (W - 1)) * kChannels), result((kTile + W - 1) * kChannels);
    // dpre of a tile, with W - 1 rows on either side: those before a document's first token are zero.
    std::vector<float> padded((kTile + 2 * (W - 1)) * kChannels);
    float* dpre = padded.data() + (W - 1) * kChannels;
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t chunk = unit / blocks * kConvolutionChunk, channel = unit % blocks * kChannels;
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

      for_each_span(documents, chunk, std::min(chunk + kConvolutionChunk, tokens), [&](Span span) {
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
inline void states_handed_on(const State& dfinal, const Documents& documents, int64_t W, Tensor& dinitial) {
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
inline std::tuple<Tensor, Tensor> parameter_totals(const Tensor& sums, int64_t D) {
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

} // namespace packc
