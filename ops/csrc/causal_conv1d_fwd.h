// The causal convolution's forward, and the states behind documents.
#pragma once

#include "causal_conv1d.h"

namespace packc {

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
  const int64_t blocks = at::divup(D, kChannels), units = at::divup(tokens, kConvolutionChunk) * blocks;
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
      const int64_t chunk = unit / blocks * kConvolutionChunk, channel = unit % blocks * kChannels;
      const int64_t channels = std::min(kChannels, D - channel);
      const Taps<kW> taps(filter, channel);
      for_each_span(documents, chunk, std::min(chunk + kConvolutionChunk, tokens), [&](Span span) {
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

} // namespace packc
