// What the selective scan's forward and backward share: how the work is cut, and how it is brought into the cache.
//
//   h[t] = exp(delta[t] A) h[t-1] + delta[t] u[t] B[t],   y[t] = C[t] . h[t] + D u[t],   out[t] = y[t] silu(z[t])
//
// for each channel d with its N states. A unit of work is a group of documents times a block of channels. It walks the
// tokens in chunks; a chunk's inputs are brought into small fp32 tiles, one per vector of channels, and every loop runs
// over (vector of channels, a few states, tokens) with the states in registers. How the work is cut depends on shapes
// and cu_seqlens only, and sums are added in order: results do not depend on the number of threads.
//
// The blocks that fall to one thread take turns at each chunk: the rows of a tensor lie pages apart, and finding a page
// anew for every block costs a good tenth of the forward.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <array>
#include <memory>
#include <vector>

#include "documents.h"
#include "exponential.h"
#include "tile.h"

namespace packc {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Tokens; the state that enters every chunk of a row is kept for the backward.
constexpr int64_t kSelectiveScanChunk = 64;
constexpr int64_t kChannels = 64; // of a block
constexpr int64_t kStates = 4; // computed at once, in registers
constexpr int64_t kGroupTokens = 1024; // a group of documents has at least so many tokens
constexpr int64_t kBundle = 8; // blocks of channels that take turns at each piece

constexpr int64_t whole_states(int64_t N) {
  return (N + kStates - 1) / kStates * kStates;
}

// The part of a document that lies in a piece; tokens count from the piece's first one.
struct Run {
  int64_t document, begin, end;
  bool starts, ends; // the document, in this run
};

// The part of a group of documents that lies in one chunk of a row.
struct Piece {
  int64_t row, first, count; // tokens of the row
  std::vector<Run> runs;

  bool begins_chunk() const {
    return first % kSelectiveScanChunk == 0;
  }
  int64_t chunk() const {
    return first / kSelectiveScanChunk;
  }
};

using Group = std::vector<Piece>;

// Consecutive documents, gathered until a group has enough tokens to be worth a sum of its own.
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
    Group& group = groups.back();
    const int64_t row = documents.packed ? 0 : n, base = documents.packed ? 0 : documents.starts[n];
    const int64_t begin = documents.starts[n] - base, end = documents.starts[n + 1] - base;
    for (int64_t t = begin; t < end;) {
      const int64_t stop = std::min(end, (t / kSelectiveScanChunk + 1) * kSelectiveScanChunk);
      const bool extends = !group.empty() && group.back().row == row && group.back().chunk() == t / kSelectiveScanChunk;
      if (!extends)
        group.push_back(Piece{row, t, 0, {}});
      Piece& piece = group.back();
      piece.runs.push_back(Run{n, t - piece.first, stop - piece.first, t == begin, stop == end});
      piece.count = stop - piece.first;
      t = stop;
    }
  }
  return groups;
}

// Channels that share B and C: at most kChannels of one group g.
struct ChannelBlock {
  int64_t index, g, first, count;

  int64_t vectors() const {
    return whole_vectors(count) / kVec;
  }
  int64_t lanes(int64_t v) const {
    return std::min(kVec, count - v * kVec);
  }
};

inline std::vector<ChannelBlock> channel_blocks(int64_t D, int64_t G) {
  std::vector<ChannelBlock> blocks;
  for (int64_t g = 0; g < G; ++g)
    for (int64_t d = 0; d < D / G; d += kChannels)
      blocks.push_back(ChannelBlock{
          static_cast<int64_t>(blocks.size()), g, g * (D / G) + d, std::min(kChannels, D / G - d)});
  return blocks;
}

// The arguments, small ones in fp32; B and C always (B, L, G, N).
struct Problem {
  Tensor u, delta, A, B, C;
  OptionalTensor D, z, delta_bias;
  bool delta_softplus;
  OptionalTensor initial_state;
  int64_t channels, N, G;

  Problem(
      const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D,
      const OptionalTensor& z, const OptionalTensor& delta_bias, bool delta_softplus,
      const OptionalTensor& initial_state)
      : u(u), delta(delta), A(fp32(A)), B(B.dim() == 3 ? B.unsqueeze(2) : B), C(C.dim() == 3 ? C.unsqueeze(2) : C),
        D(fp32(D)), z(z), delta_bias(fp32(delta_bias)), delta_softplus(delta_softplus),
        initial_state(fp32(initial_state)), channels(A.size(0)), N(A.size(1)), G(this->B.size(2)) {}

  static Tensor fp32(const Tensor& x) {
    return x.to(at::kFloat).contiguous();
  }
  static OptionalTensor fp32(const OptionalTensor& x) {
    return x ? OptionalTensor(fp32(*x)) : std::nullopt;
  }
};

// Where the state that enters a piece's chunk is kept: (B, chunks, N, D) with contiguous channels. The tensor is flat: a
// compiler that traces the op need not ask whether there is but one chunk.
inline int64_t kept_state(const Problem& p, const Piece& piece, int64_t n, int64_t channel) {
  const int64_t chunk = piece.row * at::divup(p.u.size(1), kSelectiveScanChunk) + piece.chunk();
  return (chunk * p.N + n) * p.channels + channel;
}

inline void check_sizes(const char* name, const Tensor& x, at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(x.sizes() == sizes, "selective_scan: ", name, " must have shape ", sizes, ", not ", x.sizes());
}

inline void check(const Problem& p, const Documents& documents) {
  const auto sizes = p.u.sizes();
  const int64_t L = sizes[1];
  check_sizes("delta", p.delta, sizes);
  check_sizes("B", p.B, {sizes[0], L, p.G, p.N});
  check_sizes("C", p.C, {sizes[0], L, p.G, p.N});
  if (p.z)
    check_sizes("z", *p.z, sizes);
  if (p.initial_state)
    check_sizes("initial_state", *p.initial_state, {documents.count(), p.channels, p.N});
}

// ---- tiles -----------------------------------------------------------------------------------------------------------

// Scratch memory, aligned to cache lines, for what is written before it is read: to clear it costs as much as a few
// tokens.
class Scratch {
 public:
  explicit Scratch(int64_t floats) : memory_(new(std::align_val_t(64)) float[floats]) {}
  float* data() const {
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(float* memory) const {
      operator delete[](memory, std::align_val_t(64));
    }
  };
  std::unique_ptr<float[], Free> memory_;
};

struct Zeros : Scratch {
  explicit Zeros(int64_t floats) : Scratch(floats) {
    std::fill_n(data(), floats, 0.f);
  }
};

// A value per (vector of channels, token, lane): all the tokens of one vector of channels lie together.
struct Tile : Scratch {
  Tile() : Scratch(kSelectiveScanChunk * kChannels) {}
  float* at(int64_t v, int64_t t) const {
    return data() + (v * kSelectiveScanChunk + t) * kVec;
  }
};

// A value per (vector of channels, state, lane).
struct States : Zeros {
  int64_t states;
  explicit States(int64_t N) : Zeros(whole_states(N) * kChannels), states(whole_states(N)) {}
  float* at(int64_t v, int64_t n) const {
    return data() + (v * states + n) * kVec;
  }
};

// [token][channel] or [token][state], the form in which tensors are read and written.
inline void load(
    const Tensor& x, int64_t row, int64_t token, int64_t column, int64_t tokens, int64_t columns, float* rows,
    int64_t width) {
  with_dtype(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Block<const T> block{x.const_data_ptr<T>() + row * x.stride(0), x.stride(1), x.stride(2)};
    load_tile(block.at(token, column), tokens, columns, rows, width);
  });
}

inline void store(
    const float* rows, int64_t width, const Tensor& x, int64_t row, int64_t token, int64_t column, int64_t tokens,
    int64_t columns) {
  with_dtype(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Block<T> block{x.mutable_data_ptr<T>() + row * x.stride(0), x.stride(1), x.stride(2)};
    store_tile(rows, width, tokens, columns, block.at(token, column));
  });
}

// The lanes of a vector of channels out of (D, N) fp32: one state, padded with zeros.
inline Vec gather_state(const float* matrix, int64_t N, int64_t n, int64_t lanes) {
  alignas(64) float values[kVec] = {};
  if (n < N)
    for (int64_t i = 0; i < lanes; ++i)
      values[i] = matrix[i * N + n];
  return Vec::loadu(values);
}

inline void scatter_state(Vec x, float* matrix, int64_t N, int64_t n, int64_t lanes) {
  alignas(64) float values[kVec];
  x.store(values);
  if (n < N)
    for (int64_t i = 0; i < lanes; ++i)
      matrix[i * N + n] = values[i];
}

// ---- a piece's inputs ------------------------------------------------------------------------------------------------

using Registers = std::array<Vec, kStates>;

// A times log2(e), of one block of channels: the decay is exp2(delta A).
inline States scaled_A(const Problem& p, const ChannelBlock& block) {
  States A(p.N);
  const float* source = p.A.const_data_ptr<float>() + block.first * p.N;
  for (int64_t v = 0; v < block.vectors(); ++v)
    for (int64_t n = 0; n < A.states; ++n)
      (gather_state(source + v * kVec * p.N, p.N, n, block.lanes(v)) * Vec(kLog2e)).store(A.at(v, n));
  return A;
}

// The inputs of one piece and one block of channels as the loops over states read them.
struct Inputs {
  const Problem& p;
  ChannelBlock block;
  int64_t states;
  Zeros rows, B, C; // B, C: [token][state]; lanes and states beyond the last stay zero
  Tile delta, u, x; // delta after bias and softplus; x = delta u

  explicit Inputs(const Problem& p)
      : p(p),
        block{},
        states(whole_states(p.N)),
        rows(kSelectiveScanChunk * kChannels),
        B(kSelectiveScanChunk * states),
        C(kSelectiveScanChunk * states) {}

  void load_B(const Piece& piece, int64_t g) {
    load(p.B.select(2, g), piece.row, piece.first, 0, piece.count, p.N, B.data(), states);
  }
  void load_BC(const Piece& piece, int64_t g) {
    load_B(piece, g);
    load(p.C.select(2, g), piece.row, piece.first, 0, piece.count, p.N, C.data(), states);
  }

  // Reads a (B, L, D) tensor's piece; its tokens are then row(v, t).
  void load_rows(const Tensor& tensor, const Piece& piece) {
    load(tensor, piece.row, piece.first, block.first, piece.count, block.count, rows.data(), kChannels);
  }
  Vec row(int64_t v, int64_t t) const {
    return Vec::loadu(rows.data() + t * kChannels + v * kVec);
  }

  // The lanes of a per-channel parameter; zeros where there is none.
  Vec parameter(const OptionalTensor& x, int64_t v) const {
    return x ? Vec::loadu(x->const_data_ptr<float>() + block.first + v * kVec, block.lanes(v)) : Vec(0.f);
  }

  // before(v, t, raw) sees delta with its bias, before softplus.
  template <typename Before>
  void load_piece(const Piece& piece, const ChannelBlock& next, const Before& before) {
    // Lanes beyond a block's channels stay zero, so that sums over lanes need no mask.
    if (next.count < block.count)
      std::fill_n(rows.data(), kSelectiveScanChunk * kChannels, 0.f);
    block = next;
    load_rows(p.delta, piece);
    for (int64_t v = 0; v < block.vectors(); ++v) {
      const Vec bias = parameter(p.delta_bias, v);
      for (int64_t t = 0; t < piece.count; ++t) {
        const Vec raw = row(v, t) + bias;
        before(v, t, raw);
        (p.delta_softplus ? softplus(raw) : raw).store(delta.at(v, t));
      }
    }
    load_rows(p.u, piece);
    for (int64_t v = 0; v < block.vectors(); ++v) {
      for (int64_t t = 0; t < piece.count; ++t) {
        const Vec value = row(v, t);
        value.store(u.at(v, t));
        (value * Vec::loadu(delta.at(v, t))).store(x.at(v, t));
      }
    }
  }

  // The states that a document begins with.
  void begin_document(int64_t document, int64_t v, int64_t n, Registers& h) const {
    if (!p.initial_state) {
      h.fill(Vec(0.f));
      return;
    }
    const float* matrix =
        p.initial_state->const_data_ptr<float>() + (document * p.channels + block.first + v * kVec) * p.N;
    for (int64_t i = 0; i < kStates; ++i)
      h[i] = gather_state(matrix, p.N, n + i, block.lanes(v));
  }
};

} // namespace packc
