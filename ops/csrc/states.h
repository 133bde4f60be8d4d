// The (K, V) states of chunked mixers: of documents as callers give and want them, and between chunks.
#pragma once

#include "chunks.h"
#include "gemm.h"

namespace packc {

// A strided fp32 (documents, heads, K, V) tensor, or none.
struct States {
  float* data = nullptr;
  int64_t document = 0, head = 0, k = 0, v = 0;

  explicit States(const at::Tensor& x)
      : data(x.defined() ? const_cast<float*>(x.const_data_ptr<float>()) : nullptr) {
    if (x.defined())
      document = x.stride(0), head = x.stride(1), k = x.stride(2), v = x.stride(3);
  }
  explicit operator bool() const {
    return data != nullptr;
  }
  Block<float> block(int64_t n, int64_t h, int64_t first) const {
    return {data + n * document + h * head + first * v, k, v};
  }
  void load(int64_t n, int64_t h, int64_t rows, int64_t first, int64_t count, float* tile, int64_t width) const {
    const auto x = block(n, h, first);
    load_tile(Block<const float>{x.data, x.token_stride, x.channel_stride}, rows, count, tile, width);
  }
  void store(int64_t n, int64_t h, int64_t rows, int64_t first, int64_t count, const float* tile, int64_t width) const {
    store_tile(tile, width, rows, count, block(n, h, first));
  }
};

// Columns of a state that one task carries through a document: fewer when documents and heads alone are not enough tasks.
inline int64_t columns_of_task(int64_t chains, int64_t V) {
  const int64_t wanted = 4 * at::get_num_threads();
  return std::max(kColumns, chains >= wanted ? padded(V) : padded(padded(V) * chains / wanted));
}

// Slots that no chunk of these documents uses: what an op returns may not be left to chance.
template <typename Problem>
inline void clear_unused(const Problem& p, const Chunks& chunks, int64_t rows, float* chunk_states) {
  const int64_t size = p.heads * p.K() * padded(p.V());
  std::vector<bool> used(rows * p.slots);
  for (const Chunk& chunk : chunks.all)
    if (!chunk.first)
      used[chunk.slot(p.slots)] = true;
  for (int64_t slot = 0; slot < rows * p.slots; ++slot)
    if (!used[slot])
      std::fill_n(chunk_states + slot * size, size, 0.f);
}

} // namespace packc
