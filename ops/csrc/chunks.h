// Documents in chunks of at most 64 tokens, each document from its own start: nothing of two documents ever meets in a
// product, so none can leak into another, and a short document costs no more than its own tokens.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "documents.h"
#include "exponential.h"
#include "tasks.h"
#include "tile.h"

namespace packc {

constexpr int64_t kChunk = 64;

struct Chunk {
  int64_t document;
  int64_t row; // of the batch
  int64_t begin; // token within the row
  int64_t length;
  bool first; // of its document
  bool last;

  // Where the state that enters this chunk is kept; not for a document's first. Chunks that are not the first begin 64
  // tokens or more apart, so that begin / 64 differs.
  int64_t slot(int64_t slots_of_row) const {
    return row * slots_of_row + begin / kChunk - 1;
  }
};

// The chunks of all documents in order, and where each document's begin: those of n are of[n] .. of[n + 1].
struct Chunks {
  std::vector<Chunk> all;
  std::vector<int64_t> of{0};
  int64_t tokens = 0;

  Chunks() = default;
  explicit Chunks(const Documents& documents) {
    for (int64_t n = 0; n < documents.count(); ++n)
      add(documents.packed ? 0 : n, documents.packed ? documents.starts[n] : 0, documents.length(n));
  }

  // The next document: tokens of a row of the batch.
  void add(int64_t row, int64_t start, int64_t length) {
    const int64_t n = count();
    tokens += length;
    for (int64_t t = 0; t < length; t += kChunk)
      all.push_back({n, row, start + t, std::min(kChunk, length - t), t == 0, t + kChunk >= length});
    of.push_back(static_cast<int64_t>(all.size()));
  }
  int64_t count() const {
    return static_cast<int64_t>(of.size()) - 1;
  }
};

// A strided (B, L, heads, channels) tensor of any floating dtype, read and written by chunk and head as fp32 tiles.
struct Heads {
  void* data;
  at::ScalarType dtype;
  int64_t row, token, head, channel;
  int64_t channels;

  explicit Heads(const at::Tensor& x)
      : data(const_cast<void*>(x.const_data_ptr())),
        dtype(x.scalar_type()),
        row(x.stride(0)),
        token(x.stride(1)),
        head(x.stride(2)),
        channel(x.stride(3)),
        channels(x.size(3)) {}

  template <typename T>
  Block<T> block(const Chunk& chunk, int64_t h) const {
    return {static_cast<T*>(data) + chunk.row * row + chunk.begin * token + h * head, token, channel};
  }

  // tile[token][channel] of channels first .. first + count
  void load(const Chunk& chunk, int64_t h, int64_t first, int64_t count, float* tile, int64_t width) const {
    with_dtype(dtype, [&](auto zero) {
      load_tile(block<const decltype(zero)>(chunk, h).at(0, first), chunk.length, count, tile, width);
    });
  }
  void load(const Chunk& chunk, int64_t h, float* tile, int64_t width) const {
    load(chunk, h, 0, channels, tile, width);
  }
  // Asks for what a later load will read: a head's tokens lie too far apart for the processor to foresee.
  void prefetch(const Chunk& chunk, int64_t h) const {
    if (channel != 1)
      return;
    const int64_t bytes = static_cast<int64_t>(c10::elementSize(dtype));
    const char* start = static_cast<const char*>(data) + (chunk.row * row + chunk.begin * token + h * head) * bytes;
    for (int64_t t = 0; t < chunk.length; ++t)
      for (int64_t at = 0; at < channels * bytes; at += 64)
        __builtin_prefetch(start + t * token * bytes + at);
  }
  // tile[channel][token]
  void load_transposed(const Chunk& chunk, int64_t h, float* tile, int64_t width) const {
    with_dtype(dtype, [&](auto zero) {
      const auto x = block<const decltype(zero)>(chunk, h);
      load_tile(Block<const decltype(zero)>{x.data, x.channel_stride, x.token_stride}, channels, chunk.length, tile, width);
    });
  }
  void store(const Chunk& chunk, int64_t h, const float* tile, int64_t width) const {
    with_dtype(dtype, [&](auto zero) {
      store_tile(tile, width, chunk.length, channels, block<decltype(zero)>(chunk, h));
    });
  }
};

// A strided fp32 (B, L, heads) tensor, or none.
struct PerHead {
  float* data = nullptr;
  int64_t row = 0, token = 0, head = 0;

  explicit PerHead(const at::Tensor& x)
      : data(x.defined() ? const_cast<float*>(x.const_data_ptr<float>()) : nullptr) {
    if (x.defined())
      row = x.stride(0), token = x.stride(1), head = x.stride(2);
  }
  explicit operator bool() const {
    return data != nullptr;
  }
  float& at(const Chunk& chunk, int64_t h, int64_t i) const {
    return data[chunk.row * row + (chunk.begin + i) * token + h * head];
  }
};

// fp32 tiles that begin as zeros, each on cache lines of its own.
class Tiles {
 public:
  explicit Tiles(int64_t floats) : memory_(floats + kAlignment), next_(memory_.data()) {
    while (reinterpret_cast<uintptr_t>(next_) % 64 != 0)
      ++next_;
  }
  float* take(int64_t floats) {
    float* tile = next_;
    next_ += (floats + kAlignment - 1) / kAlignment * kAlignment;
    TORCH_INTERNAL_ASSERT(next_ <= memory_.data() + memory_.size());
    return tile;
  }

 private:
  static constexpr int64_t kAlignment = 16;
  std::vector<float> memory_;
  float* next_;
};

// How much of a value is left after the tokens in between, of one chunk and head. Decays multiply, so their logarithms
// are summed, over just the tokens in question: differences of sums from the chunk's start would lose what a strong
// decay swamps. Nothing here is an exponential of a positive number, if no g is positive.
struct Decays {
  int64_t length;
  bool any;
  float g[kChunk]; // to base 2
  float from_start[kChunk]; // of what enters the chunk, in token i
  float to_end[kChunk]; // of token j, in what leaves the chunk
  float whole; // of what enters, in what leaves

  Decays(const PerHead& log_decay, const Chunk& chunk, int64_t head) : length(chunk.length), any(bool(log_decay)) {
    std::fill(g, g + kChunk, 0.f);
    float sum = 0;
    for (int64_t i = 0; i < length; ++i) {
      g[i] = any ? log_decay.at(chunk, head, i) * kLog2e : 0.f;
      from_start[i] = sum += g[i];
    }
    whole = sum;
    sum = 0;
    for (int64_t j = length - 1; j >= 0; --j) {
      to_end[j] = sum;
      sum += g[j];
    }
    powers(from_start);
    powers(to_end);
    float end[kVec] = {whole};
    exp2(Vec::loadu(end)).store(end);
    whole = end[0];
  }

  // between[i][j], j <= i: of token j, in token i; 0 for j > i in the bands of 16 columns that reach the diagonal.
  void between(float* out) const {
    float logarithm[kChunk] = {};
    for (int64_t i = 0; i < length; ++i) {
      const int64_t end = (i / 16 + 1) * 16;
      float* row = out + i * kChunk;
      for (int64_t j = 0; j < end; j += kVec) {
        const Vec sum = Vec::loadu(logarithm + j) + Vec(g[i]);
        sum.store(logarithm + j);
        if (any)
          exp2(sum).store(row + j);
        else
          Vec(1.f).store(row + j);
      }
      logarithm[i] = 0;
      row[i] = 1;
      std::fill(row + i + 1, row + end, 0.f);
    }
  }

 private:
  void powers(float* x) {
    std::fill(x + length, x + kChunk, 0.f);
    for (int64_t i = 0; i < kChunk; i += kVec)
      exp2(Vec::loadu(x + i)).store(x + i);
  }
};

} // namespace packc
