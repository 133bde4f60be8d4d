// Blocks of a strided (token, channel) tensor as small dense fp32 tiles [token][channel], and back.
//
// This is how the kernels read what models hand over, in place: token-major rows, the halves of a projection (channels
// contiguous, rows far apart), channel-first memory (tokens contiguous), any other stride; fp32, bf16 or fp16. A tile is
// meant to stay in a cache, so reading a tensor through it costs little more than reading it once.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace packc {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t kVec = Vec::size();

// Tiles have whole vectors in each row: kernels compute the last, partial vector like any other.
constexpr int64_t whole_vectors(int64_t channels) {
  return (channels + kVec - 1) / kVec * kVec;
}

// Element (token, channel) of the block lies at data[token * token_stride + channel * channel_stride].
template <typename T>
struct Block {
  T* data;
  int64_t token_stride;
  int64_t channel_stride;

  Block at(int64_t token, int64_t channel) const {
    return {data + token * token_stride + channel * channel_stride, token_stride, channel_stride};
  }
};

// Calls body(T(0)) with the C++ type of a floating dtype that kernels read.
template <typename Body>
void with_dtype(at::ScalarType dtype, const Body& body) {
  switch (dtype) {
    case at::kFloat:
      return body(float(0));
    case at::kBFloat16:
      return body(c10::BFloat16(0));
    case at::kHalf:
      return body(c10::Half(0));
    default:
      TORCH_CHECK_TYPE(false, "expected float32, bfloat16 or float16, not ", dtype);
  }
}

// ---- contiguous runs of n elements -----------------------------------------------------------------------------------

template <typename T>
inline void load_run(const T* source, int64_t n, float* out) {
  int64_t i = 0;
  if constexpr (std::is_same_v<T, float>) {
    for (; i + kVec <= n; i += kVec)
      Vec::loadu(source + i).store(out + i);
  } else {
    using Narrow = at::vec::Vectorized<T>;
    for (; i + Narrow::size() <= n; i += Narrow::size()) {
      auto [low, high] = at::vec::convert_to_float<T>(Narrow::loadu(source + i));
      low.store(out + i);
      high.store(out + i + kVec);
    }
  }
  for (; i < n; ++i)
    out[i] = static_cast<float>(source[i]);
}

template <typename T>
inline void store_run(const float* source, int64_t n, T* out) {
  int64_t i = 0;
  if constexpr (std::is_same_v<T, float>) {
    for (; i + kVec <= n; i += kVec)
      Vec::loadu(source + i).store(out + i);
  } else {
    using Narrow = at::vec::Vectorized<T>;
    for (; i + Narrow::size() <= n; i += Narrow::size())
      at::vec::convert_from_float<T>(Vec::loadu(source + i), Vec::loadu(source + i + kVec)).store(out + i);
  }
  for (; i < n; ++i)
    out[i] = static_cast<T>(source[i]);
}

// ---- blocks ----------------------------------------------------------------------------------------------------------

// tile[token * width + channel] for tokens x channels; the rest of each row of `width` floats is left as it is.
template <typename T>
inline void load_tile(Block<const T> block, int64_t tokens, int64_t channels, float* tile, int64_t width) {
  if (block.channel_stride == 1) {
    for (int64_t t = 0; t < tokens; ++t)
      load_run(block.data + t * block.token_stride, channels, tile + t * width);
    return;
  }
  int64_t whole_tokens = 0, whole_channels = 0;
  if (block.token_stride == 1) {
    whole_tokens = tokens / kVec * kVec;
    whole_channels = channels / kVec * kVec;
    for (int64_t c = 0; c < whole_channels; c += kVec) {
      for (int64_t t = 0; t < whole_tokens; t += kVec) {
        const T* corner = block.data + c * block.channel_stride + t;
        float* target = tile + t * width + c;
        if constexpr (std::is_same_v<T, float>) {
          at::vec::transpose_mxn<float, kVec, kVec>(corner, block.channel_stride, target, width);
        } else {
          float square[kVec * kVec];
          for (int64_t i = 0; i < kVec; ++i) {
            Vec row;
            at::vec::load_to_float<T>(corner + i * block.channel_stride, row);
            row.store(square + i * kVec);
          }
          at::vec::transpose_mxn<float, kVec, kVec>(square, kVec, target, width);
        }
      }
    }
  }
  // Any stride; of channel-first memory only the rim outside whole squares.
  for (int64_t c = 0; c < channels; ++c) {
    const T* column = block.data + c * block.channel_stride;
    for (int64_t t = c < whole_channels ? whole_tokens : 0; t < tokens; ++t)
      tile[t * width + c] = static_cast<float>(column[t * block.token_stride]);
  }
}

// The way back: out of the tile's tokens x channels into the block.
template <typename T>
inline void store_tile(const float* tile, int64_t width, int64_t tokens, int64_t channels, Block<T> block) {
  if (block.channel_stride == 1) {
    for (int64_t t = 0; t < tokens; ++t)
      store_run(tile + t * width, channels, block.data + t * block.token_stride);
    return;
  }
  int64_t whole_tokens = 0, whole_channels = 0;
  if (block.token_stride == 1) {
    whole_tokens = tokens / kVec * kVec;
    whole_channels = channels / kVec * kVec;
    for (int64_t c = 0; c < whole_channels; c += kVec) {
      for (int64_t t = 0; t < whole_tokens; t += kVec) {
        T* corner = block.data + c * block.channel_stride + t;
        const float* source = tile + t * width + c;
        if constexpr (std::is_same_v<T, float>) {
          at::vec::transpose_mxn<float, kVec, kVec>(source, width, corner, block.channel_stride);
        } else {
          float square[kVec * kVec];
          at::vec::transpose_mxn<float, kVec, kVec>(source, width, square, kVec);
          for (int64_t i = 0; i < kVec; ++i)
            store_run(square + i * kVec, kVec, corner + i * block.channel_stride);
        }
      }
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    T* column = block.data + c * block.channel_stride;
    for (int64_t t = c < whole_channels ? whole_tokens : 0; t < tokens; ++t)
      column[t * block.token_stride] = static_cast<T>(tile[t * width + c]);
  }
}

} // namespace packc
