// packc_cpu::linear_attention_enter and _leave: what a state that comes late adds to results of linear attention and SSD,
// and the gradient of one to gradients, in place. ops/common/late_states.py has the formulas.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cfloat>
#include <cmath>

#include "phases.h"
#include "sigmoid.h"

namespace packc {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

// Zero where it would be a subnormal number, with which processors take their time.
inline float normal(float x) {
  return std::abs(x) < FLT_MIN ? 0.f : x;
}

// Some consecutive tokens of one document, in chunks from the first of them.
struct Segment {
  Heads keys; // q or k: (1, L, G, K)
  Heads values; // (1, L, H, V)
  PerHead g;
  int64_t heads, groups;
  Chunks chunks;

  Segment(const Tensor& keys, const Tensor& values, const Optional& g)
      : keys(keys),
        values(values),
        g(g.value_or(Tensor())),
        heads(values.size(2)),
        groups(keys.size(2)),
        chunks(Documents(std::nullopt, 1, values.size(1))) {}

  int64_t K() const {
    return keys.channels;
  }
  int64_t V() const {
    return values.channels;
  }
  int64_t count() const {
    return static_cast<int64_t>(chunks.all.size());
  }
  int64_t place(const Chunk& chunk) const {
    return &chunk - chunks.all.data();
  }

  // What is left of a state that has passed 0, 1, ... of the chunks, forwards or `backwards`: [chunks][heads].
  std::vector<float> left(bool backwards) const {
    std::vector<float> found((count() + 1) * heads, 1.f);
    for (int64_t i = 0; i < count(); ++i) {
      const Chunk& chunk = chunks.all[backwards ? count() - 1 - i : i];
      for (int64_t h = 0; h < heads; ++h) {
        float sum = 0;
        for (int64_t t = 0; g && t < chunk.length; ++t)
          sum += g.at(chunk, h, t) * kLog2e;
        found[(i + 1) * heads + h] = normal(found[i * heads + h] * std::exp2(sum));
      }
    }
    return found;
  }

  // Whether anything is left, so far on the way, of a state of the group.
  bool reached(const float* left_of_heads, int64_t group) const {
    const int64_t count = heads / groups;
    return std::any_of(left_of_heads + group * count, left_of_heads + (group + 1) * count, [](float x) { return x != 0; });
  }

  // Of every head (K, padded V), or (V, padded K) of the transposed states.
  std::vector<float> tiles_of(const Tensor& states, bool transposed = false) const {
    const int64_t rows = transposed ? V() : K(), columns = transposed ? K() : V(), width = padded(columns);
    const States read(transposed ? states.transpose(2, 3) : states);
    std::vector<float> tiles(heads * rows * width);
    for (int64_t h = 0; h < heads; ++h)
      read.load(0, h, rows, 0, columns, tiles.data() + h * rows * width, width);
    return tiles;
  }
};

// out_i += scale left_i gate_i (S^T q_i), and to the state that enters the chunk what is left of S there.
class ChunkEntered {
 public:
  ChunkEntered(
      const Segment& p, const std::vector<float>& left, const std::vector<float>& states, float scale,
      const std::optional<Heads>& z, float* chunk_states)
      : p_(p),
        left_(left),
        states_(states),
        scale_(scale),
        z_(z),
        chunk_states_(chunk_states),
        wide_K_(padded(p.K())),
        wide_V_(padded(p.V())),
        tiles_(kChunk * (2 * wide_K_ + 3 * wide_V_)),
        q_(tiles_.take(kChunk * wide_K_)),
        scaled_q_(tiles_.take(kChunk * wide_K_)),
        out_(tiles_.take(kChunk * wide_V_)),
        added_(tiles_.take(kChunk * wide_V_)),
        gate_(tiles_.take(kChunk * wide_V_)) {}

  void prefetch(const Chunk& chunk, int64_t group) const {
    p_.keys.prefetch(chunk, group);
  }

  void run(const Chunk& chunk, int64_t group) {
    const int64_t heads = p_.heads / p_.groups, c = p_.place(chunk);
    const float* lefts = left_.data() + c * p_.heads;
    if (!p_.reached(lefts, group))
      return;
    p_.keys.load(chunk, group, q_, wide_K_);
    for (int64_t h = group * heads; h < (group + 1) * heads; ++h) {
      const float left = lefts[h];
      if (left == 0)
        continue;
      const float* state = states_.data() + h * p_.K() * wide_V_;
      output(chunk, h, left, state);
      if (c > 0)
        add_row(
            chunk_states_ + ((c - 1) * p_.heads + h) * p_.K() * wide_V_, state, p_.K() * wide_V_, left);
    }
  }

 private:
  void output(const Chunk& chunk, int64_t h, float left, const float* state) {
    const Decays decays(p_.g, chunk, h);
    std::copy_n(q_, chunk.length * wide_K_, scaled_q_);
    for (int64_t i = 0; i < chunk.length; ++i)
      scale_row(scaled_q_ + i * wide_K_, wide_K_, scale_ * normal(left * decays.from_start[i]));
    p_.values.load(chunk, h, out_, wide_V_);
    float* into = z_ ? added_ : out_;
    multiply(chunk.length, wide_V_, p_.K(), Left{scaled_q_, wide_K_}, state, wide_V_, into, wide_V_, !z_);
    if (z_) {
      z_->load(chunk, h, gate_, wide_V_);
      for (int64_t at = 0; at < chunk.length * wide_V_; at += kVec) {
        const Vec gate = silu(Vec::loadu(gate_ + at));
        at::vec::fmadd(gate, Vec::loadu(added_ + at), Vec::loadu(out_ + at)).store(out_ + at);
      }
    }
    p_.values.store(chunk, h, out_, wide_V_);
  }

  const Segment& p_;
  const std::vector<float>&left_, &states_;
  const float scale_;
  const std::optional<Heads>& z_;
  float* const chunk_states_;
  const int64_t wide_K_, wide_V_;
  Tiles tiles_;
  float *q_, *scaled_q_, *out_, *added_, *gate_;
};

// dk_j += left_j step_j dS v_j, dv_j += left_j step_j dS^T k_j, owed_j = left_j k_j^T dS v_j.
class ChunkLeft {
 public:
  ChunkLeft(
      const Segment& p, const std::vector<float>& left, const std::vector<float>& dstates,
      const std::vector<float>& transposed, const PerHead& step, const Heads& dk, const Heads& dv, const PerHead& owed)
      : p_(p),
        left_(left),
        dstates_(dstates),
        transposed_(transposed),
        step_(step),
        dks_(dk),
        dvs_(dv),
        owed_(owed),
        wide_K_(padded(p.K())),
        wide_V_(padded(p.V())),
        tiles_(kChunk * (3 * wide_K_ + 3 * wide_V_)),
        k_(tiles_.take(kChunk * wide_K_)),
        scaled_k_(tiles_.take(kChunk * wide_K_)),
        dk_(tiles_.take(kChunk * wide_K_)),
        v_(tiles_.take(kChunk * wide_V_)),
        dv_(tiles_.take(kChunk * wide_V_)),
        of_keys_(tiles_.take(kChunk * wide_V_)) {}

  void prefetch(const Chunk& chunk, int64_t group) const {
    p_.keys.prefetch(chunk, group);
    dks_.prefetch(chunk, group);
  }

  void run(const Chunk& chunk, int64_t group) {
    const int64_t heads = p_.heads / p_.groups;
    const float* lefts = left_.data() + (p_.count() - 1 - p_.place(chunk)) * p_.heads;
    if (!p_.reached(lefts, group))
      return;
    p_.keys.load(chunk, group, k_, wide_K_);
    dks_.load(chunk, group, dk_, wide_K_);
    for (int64_t h = group * heads; h < (group + 1) * heads; ++h)
      if (lefts[h] != 0)
        head(chunk, h, lefts[h]);
    dks_.store(chunk, group, dk_, wide_K_);
  }

 private:
  void head(const Chunk& chunk, int64_t h, float left) {
    const Decays decays(p_.g, chunk, h);
    float left_of[kChunk];
    std::copy_n(k_, chunk.length * wide_K_, scaled_k_);
    for (int64_t j = 0; j < chunk.length; ++j) {
      left_of[j] = normal(left * decays.to_end[j]);
      scale_row(scaled_k_ + j * wide_K_, wide_K_, left_of[j]);
    }
    p_.values.load(chunk, h, v_, wide_V_);
    dvs_.load(chunk, h, dv_, wide_V_);
    const float* dstate = dstates_.data() + h * p_.K() * wide_V_;
    multiply(chunk.length, wide_V_, p_.K(), Left{scaled_k_, wide_K_}, dstate, wide_V_, of_keys_, wide_V_, false);
    for (int64_t j = 0; j < chunk.length; ++j) {
      const float step = step_ ? step_.at(chunk, h, j) : 1.f;
      owed_.at(chunk, h, j) = dot_row(of_keys_ + j * wide_V_, v_ + j * wide_V_, wide_V_);
      add_row(dv_ + j * wide_V_, of_keys_ + j * wide_V_, wide_V_, step);
      scale_row(v_ + j * wide_V_, wide_V_, step * left_of[j]);
    }
    dvs_.store(chunk, h, dv_, wide_V_);
    const float* transposed = transposed_.data() + h * p_.V() * wide_K_;
    multiply(chunk.length, wide_K_, p_.V(), Left{v_, wide_V_}, transposed, wide_K_, dk_, wide_K_, true);
  }

  const Segment& p_;
  const std::vector<float>&left_, &dstates_, &transposed_;
  const PerHead step_;
  const Heads &dks_, &dvs_;
  const PerHead owed_;
  const int64_t wide_K_, wide_V_;
  Tiles tiles_;
  float *k_, *scaled_k_, *dk_, *v_, *dv_, *of_keys_;
};

Tensor up_to(const Tensor& x, int64_t end) {
  return x.slice(1, 0, end);
}

Tensor from(const Tensor& x, int64_t begin) {
  return x.slice(1, begin);
}

// To out, final_state (documents, H, K, V) of one document, unless it is of none, and chunk_states, of tokens 0 .. end.
void linear_attention_enter(
    const Tensor& out, const Tensor& final_state, const Tensor& chunk_states, const Tensor& entering, const Tensor& q,
    const Optional& g, double scale, const Optional& z, const Tensor& end, const Tensor& document) {
  const int64_t last = end.item<int64_t>();
  if (last == 0)
    return;
  const Segment p(up_to(q, last), up_to(out, last), g);
  const std::vector<float> left = p.left(false), states = p.tiles_of(entering);
  const std::optional<Heads> gate = z ? std::optional<Heads>(up_to(*z, last)) : std::nullopt;
  float* kept = chunk_states.mutable_data_ptr<float>();
  for_each_chunk(p, p.chunks, [&] { return ChunkEntered(p, left, states, static_cast<float>(scale), gate, kept); });
  if (final_state.size(0) == 0)
    return;
  const States finals(final_state);
  const int64_t n = document.item<int64_t>(), size = p.K() * padded(p.V());
  std::vector<float> state(size);
  for (int64_t h = 0; h < p.heads; ++h) {
    finals.load(n, h, p.K(), 0, p.V(), state.data(), padded(p.V()));
    add_row(state.data(), states.data() + h * size, size, left[p.count() * p.heads + h]);
    finals.store(n, h, p.K(), 0, p.V(), state.data(), padded(p.V()));
  }
}

// To dk and dv of tokens begin .. L. Returns what is to be added to the gradients of g and of steps of these tokens,
// (1, L - begin, H).
std::tuple<Tensor, Tensor> linear_attention_leave(
    const Tensor& dk, const Tensor& dv, const Tensor& leaving, const Tensor& before, const Tensor& k, const Tensor& v,
    const Optional& all_g, const Optional& all_steps, const Tensor& begin) {
  const int64_t first = begin.item<int64_t>();
  const auto segment_if = [&](const Optional& x) { return x ? Optional(from(*x, first)) : std::nullopt; };
  const Segment p(from(k, first), from(v, first), segment_if(all_g));
  const PerHead step(segment_if(all_steps).value_or(Tensor()));
  const Tensor dstep = at::zeros({1, p.chunks.tokens, p.heads}, leaving.options()), dg = at::zeros(dstep.sizes(), dstep.options());
  if (p.count() == 0)
    return {dg, dstep};
  const std::vector<float> left = p.left(true), dstates = p.tiles_of(leaving), transposed = p.tiles_of(leaving, true);
  const PerHead owed(dstep), dgs(dg);
  const Heads dks(from(dk, first)), dvs(from(dv, first));
  for_each_chunk(p, p.chunks, [&] { return ChunkLeft(p, left, dstates, transposed, step, dks, dvs, owed); });
  const std::vector<float> states = p.tiles_of(before);
  const int64_t size = p.K() * padded(p.V());
  for (int64_t h = 0; h < p.heads; ++h) {
    double sum = left[p.count() * p.heads + h] * dot_row(states.data() + h * size, dstates.data() + h * size, size);
    for (const Chunk& chunk : p.chunks.all)
      for (int64_t t = 0; t < chunk.length; ++t) {
        dgs.at(chunk, h, t) = static_cast<float>(sum);
        sum += (step ? step.at(chunk, h, t) : 1.f) * owed.at(chunk, h, t);
      }
  }
  return {dg, dstep};
}

TORCH_LIBRARY_FRAGMENT(packc_cpu, library) {
  library.def("linear_attention_enter", torch::dispatch(c10::kCPU, TORCH_FN(linear_attention_enter)));
  library.def("linear_attention_leave", torch::dispatch(c10::kCPU, TORCH_FN(linear_attention_leave)));
}

} // namespace
} // namespace packc
