// The (K, V) states of chunked mixers: of documents as callers give and want them, and between chunks.
#pragma once

#include "chunks.h"
#include "gemm.h"
#include "rows.h"

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
inline int64_t columns_of_task(int64_t chains, int64_t V, int64_t threads) {
  const int64_t wanted = 4 * threads;
  return std::max(kColumns, chains >= wanted ? padded(V) : padded(padded(V) * chains / wanted));
}

// Threads for a phase that lets every token meet a (K, V) state of every head.
template <typename Problem>
inline int64_t threads_for_states(const Problem& p, const Chunks& chunks) {
  return threads_for(chunks.tokens * p.heads * p.K() * p.V());
}

// Where a walk along a document stands: the chunk it comes to, and the columns `first` .. `first + count` of a head's
// state that it carries, in rows of `columns` of which the first `width` count.
struct Carried {
  const Chunk& chunk;
  const Chunk* next; // null at the walk's end
  int64_t head, first, count, width, columns;
  float* state;
  bool zero; // nothing has come into the state yet
  bool wanted; // somebody reads what the state becomes
};

// Carries states along every document, forwards or `backwards`: `from`, or zeros, at its start, into `to` at its end.
// What comes to a chunk, except to a document's first one on the way, is kept where the state between it and the one
// before it is, unless `between` is null. make(columns) makes what a thread works with; step(carried, scratch) lets the state pass a chunk.
template <typename Problem, typename Make, typename Step>
void carry_along_documents(
    const Problem& p, const Chunks& chunks, bool backwards, States from, States to, float* between, const Make& make,
    const Step& step) {
  const int64_t K = p.K(), V = p.V(), wide_V = padded(V);
  const int64_t documents = static_cast<int64_t>(chunks.of.size()) - 1, threads = threads_for_states(p, chunks);
  const int64_t columns = columns_of_task(documents * p.heads, V, threads), blocks = (wide_V + columns - 1) / columns;
  using Scratch = decltype(make(columns));
  struct Own {
    Tiles tiles;
    float* state;
    Scratch scratch;
    Own(int64_t floats, Scratch&& scratch) : tiles(floats), state(tiles.take(floats)), scratch(std::move(scratch)) {}
  };
  const auto own = [&] { return Own(K * columns, make(columns)); };
  for_each_task(threads, documents * p.heads * blocks, own, [&](int64_t task, Own& own) {
    const int64_t n = task / (p.heads * blocks), h = task / blocks % p.heads, first = task % blocks * columns;
    const int64_t count = std::min(columns, V - first), width = padded(count);
    std::fill(own.state, own.state + K * columns, 0.f);
    if (from)
      from.load(n, h, K, first, count, own.state, columns);
    const int64_t length = chunks.of[n + 1] - chunks.of[n];
    for (int64_t i = 0; i < length; ++i) {
      const Chunk* chunk = &chunks.all[backwards ? chunks.of[n + 1] - 1 - i : chunks.of[n] + i];
      if (i > 0 && between != nullptr) {
        float* kept = between + p.state_at(backwards ? chunk[1] : *chunk, h) + first;
        for (int64_t k = 0; k < K; ++k)
          std::copy_n(own.state + k * columns, width, kept + k * wide_V);
      }
      const Chunk* next = i + 1 == length ? nullptr : chunk + (backwards ? -1 : 1);
      step(
          Carried{*chunk, next, h, first, count, width, columns, own.state, i == 0 && !from, next != nullptr || to},
          own.scratch);
    }
    if (to)
      to.store(n, h, K, first, count, own.state, columns);
  });
}

// state = whole state, for a state whose rows decay alike or each on its own.
template <typename Whole>
inline void decay_state(const Carried& at, int64_t K, const Whole& whole) {
  for (int64_t i = 0; i < K; ++i)
    scale_row(at.state + i * at.columns, at.width, whole(i));
}

inline bool is_zero(const Carried& at, int64_t K) {
  for (int64_t i = 0; i < K; ++i)
    for (int64_t j = 0; j < at.width; ++j)
      if (at.state[i * at.columns + j] != 0)
        return false;
  return true;
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
