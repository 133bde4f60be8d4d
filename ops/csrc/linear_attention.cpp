// packc_cpu::linear_attention and its backward: the chunked kernel behind linear attention and SSD.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "linear_attention_bwd.h"
#include "phases.h"
#include "sigmoid.h"

namespace packc {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

Tensor or_undefined(const Optional& x) {
  return x.value_or(Tensor());
}

// States are (documents, H, K, V) to the kernels, (documents, H, V, K) outside if value_major.
Tensor key_major(const Optional& state, bool value_major) {
  return state && value_major ? state->transpose(2, 3) : or_undefined(state);
}

LinearAttention problem(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Optional& g,
    const Optional& step,
    const Optional& skip,
    double scale,
    const Optional& initial_state) {
  return {
      Heads(q),
      Heads(k),
      Heads(v),
      PerHead(or_undefined(g)),
      PerHead(or_undefined(step)),
      skip ? skip->const_data_ptr<float>() : nullptr,
      static_cast<float>(scale),
      v.size(2),
      q.size(2),
      at::divup(q.size(1), kChunk)};
}

Tensor new_states(const Tensor& v, int64_t documents, int64_t K, bool value_major) {
  const int64_t H = v.size(2), V = v.size(3);
  return at::empty(value_major ? at::IntArrayRef{documents, H, V, K} : at::IntArrayRef{documents, H, K, V},
                   v.options().dtype(at::kFloat));
}

// The forward's phases of a chunk.
struct ForwardWalk {
  const LinearAttention& p;
  float* chunk_states;
  CarryState state;
  ChunkOutputs outputs;

  ForwardWalk(const LinearAttention& p, States initial, float* chunk_states, const Heads& out)
      : p(p), chunk_states(chunk_states), state(p, padded(p.V())), outputs(p, initial, chunk_states, out) {}

  void before(const Chunk&, int64_t) {}
  float* kept(const Chunk& chunk, int64_t h) const {
    return chunk_states + p.state_at(chunk, h);
  }
  void step(const Carried& at) {
    state.step(at);
  }
  void after(const Chunk& chunk, int64_t group) {
    outputs.run(chunk, group);
  }
};

// The backward's, likewise.
struct BackwardWalk {
  LinearAttention p;
  Tiles tiles;
  float* dstates;
  CarryStateGradient state;
  ChunkBackward gradients;

  BackwardWalk(
      const LinearAttention& all,
      const LinearAttentionGradients& gradients,
      const Heads& dout,
      const Chunks& chunks,
      States initial,
      States dfinal,
      const float* chunk_states)
      : p(all.for_walking()),
        tiles(p.heads / p.groups * p.K() * padded(p.V())),
        dstates(tiles.take(p.heads / p.groups * p.K() * padded(p.V()))),
        state(p, dout, padded(p.V())),
        gradients(p, gradients, dout, chunks, initial, dfinal, chunk_states, dstates) {}

  void before(const Chunk&, int64_t) {}
  float* kept(const Chunk& chunk, int64_t h) const {
    return dstates + p.state_gradient_at(chunk, h);
  }
  void step(const Carried& at) {
    state.step(at);
  }
  void after(const Chunk& chunk, int64_t group) {
    gradients.run(chunk, group);
  }
};

std::tuple<Tensor, Tensor, Tensor> linear_attention(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Optional& g,
    const Optional& step,
    const Optional& skip,
    double scale,
    const Optional& cu_seqlens,
    const Optional& initial_state,
    bool output_final_state,
    bool value_major,
    bool round_out) {
  const Documents documents(cu_seqlens, v.size(0), v.size(1));
  const Chunks chunks(documents);
  const LinearAttention p = problem(q, k, v, g, step, skip, scale, initial_state);
  const States initial(key_major(initial_state, value_major));
  Tensor out = at::empty(v.sizes(), v.options().dtype(round_out ? v.scalar_type() : at::kFloat));
  Tensor final = new_states(v, output_final_state ? documents.count() : 0, p.K(), value_major);
  Tensor chunk_states =
      at::empty({v.size(0) * p.slots * p.heads * p.K() * padded(p.V())}, v.options().dtype(at::kFloat));
  const States finals(output_final_state ? key_major(final, value_major) : Tensor());
  float* states = chunk_states.mutable_data_ptr<float>();
  clear_unused(p, chunks, v.size(0), states);
  const Heads results(out);
  if (worth_walking(p, chunks)) {
    walk_documents(p, chunks, false, initial, finals, [&] { return ForwardWalk(p, initial, states, results); });
  } else {
    carry_states(p, chunks, initial, finals, states);
    for_each_chunk(p, chunks, [&] { return ChunkOutputs(p, initial, states, results); });
  }
  return {out, final, chunk_states};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_attention_bwd(
    const Tensor& dout,
    const Optional& dfinal_state,
    const Tensor& chunk_states,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Optional& g,
    const Optional& step,
    const Optional& skip,
    double scale,
    const Optional& cu_seqlens,
    const Optional& initial_state,
    bool value_major) {
  const Documents documents(cu_seqlens, v.size(0), v.size(1));
  const Chunks chunks(documents);
  const LinearAttention p = problem(q, k, v, g, step, skip, scale, initial_state);
  const auto fp32 = v.options().dtype(at::kFloat);
  const auto none = [&](bool there, at::IntArrayRef sizes) { return at::empty(there ? sizes : at::IntArrayRef{0}, fp32); };
  Tensor dq = at::empty(q.sizes(), q.options()), dk = at::empty(k.sizes(), k.options());
  Tensor dv = at::empty(v.sizes(), v.options());
  const int64_t B = v.size(0), L = v.size(1), H = p.heads;
  Tensor dg = none(g.has_value(), {B, L, H}), dstep = none(step.has_value(), {B, L, H});
  Tensor dinitial = initial_state ? new_states(v, documents.count(), p.K(), value_major) : none(false, {});
  const int64_t count = static_cast<int64_t>(chunks.all.size());
  Tensor dskip = at::zeros({skip ? count : 0, H, padded(p.V())}, fp32);

  const States initial(key_major(initial_state, value_major)), dfinal(key_major(dfinal_state, value_major));
  const States dinitials(initial_state ? key_major(dinitial, value_major) : Tensor());
  const Heads douts(dout);
  const LinearAttentionGradients gradients{
      Heads(dq),
      Heads(dk),
      Heads(dv),
      PerHead(g ? dg : Tensor()),
      PerHead(step ? dstep : Tensor()),
      skip ? dskip.mutable_data_ptr<float>() : nullptr};
  const float* states = chunk_states.const_data_ptr<float>();
  if (worth_walking(p, chunks)) {
    const auto walk = [&] { return BackwardWalk(p, gradients, douts, chunks, initial, dfinal, states); };
    walk_documents(p, chunks, true, dfinal, dinitials, walk);
  } else {
    Tensor dstates = at::empty(chunk_states.sizes(), fp32);
    float* dkept = dstates.mutable_data_ptr<float>();
    carry_state_gradients(p, douts, chunks, dfinal, dinitials, dkept);
    for_each_chunk(p, chunks, [&] {
      return ChunkBackward(p, gradients, douts, chunks, initial, dfinal, states, dkept);
    });
  }
  return {dq, dk, dv, dg, dstep, skip ? dskip.sum(0).slice(1, 0, p.V()).contiguous() : none(false, {}), dinitial};
}

// Of tokens begin .. L of the one row: the sum of the logarithms of their decays (1, H), and the state that they leave.
std::tuple<Tensor, Tensor> linear_attention_summary(
    const Tensor& all_k,
    const Tensor& all_v,
    const Optional& all_g,
    const Optional& all_steps,
    bool value_major,
    const Tensor& begin) {
  const int64_t first = begin.item<int64_t>();
  const auto segment = [&](const Tensor& x) { return x.slice(1, first); };
  const auto segment_if = [&](const Optional& x) { return x ? Optional(segment(*x)) : std::nullopt; };
  const Tensor k = segment(all_k), v = segment(all_v);
  const Optional g = segment_if(all_g), step = segment_if(all_steps);
  const Chunks chunks(Documents(std::nullopt, 1, v.size(1)));
  const LinearAttention p = problem(k, k, v, g, step, std::nullopt, 1, std::nullopt);
  Tensor state = new_states(v, 1, p.K(), value_major);
  carry_states(p, chunks, States(Tensor()), States(key_major(state, value_major)), nullptr);
  return {g ? g->sum(1) : at::zeros({1, p.heads}, state.options()), state};
}

// Of tokens 0 .. end of the one row: the gradient of the state that enters.
Tensor linear_attention_adjoint(
    const Tensor& all_douts,
    const Tensor& all_q,
    const Optional& all_g,
    double scale,
    bool value_major,
    const Tensor& end) {
  const int64_t last = end.item<int64_t>();
  const auto segment = [&](const Tensor& x) { return x.slice(1, 0, last); };
  const Tensor dout = segment(all_douts), q = segment(all_q);
  const Optional g = all_g ? Optional(segment(*all_g)) : std::nullopt;
  const Chunks chunks(Documents(std::nullopt, 1, q.size(1)));
  const LinearAttention p = problem(q, q, dout, g, std::nullopt, std::nullopt, scale, std::nullopt);
  Tensor dstate = new_states(dout, 1, p.K(), value_major);
  const States dstates(key_major(dstate, value_major));
  carry_state_gradients(p, Heads(dout), chunks, States(Tensor()), dstates, nullptr);
  return dstate;
}

// Contiguous fp32. ATen's own rounds the last elements of a thread's share in another way than the rest, so that a
// token's result would depend on where it lies.
template <Vec (*kFunction)(Vec)>
Tensor everywhere_alike(const Tensor& x) {
  Tensor out = at::empty_like(x);
  const float* from = x.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  const int64_t n = x.numel();
  at::parallel_for(0, (n + kVec - 1) / kVec, 2048, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin * kVec; at < std::min(end * kVec, n); at += kVec) {
      const int64_t count = std::min<int64_t>(kVec, n - at);
      kFunction(Vec::loadu(from + at, count)).store(to + at, count);
    }
  });
  return out;
}

} // namespace

TORCH_LIBRARY_FRAGMENT(packc_cpu, library) {
  library.def("linear_attention", torch::dispatch(c10::kCPU, TORCH_FN(linear_attention)));
  library.def("linear_attention_bwd", torch::dispatch(c10::kCPU, TORCH_FN(linear_attention_bwd)));
  library.def("linear_attention_summary", torch::dispatch(c10::kCPU, TORCH_FN(linear_attention_summary)));
  library.def("linear_attention_adjoint", torch::dispatch(c10::kCPU, TORCH_FN(linear_attention_adjoint)));
  library.def("silu", torch::dispatch(c10::kCPU, TORCH_FN(everywhere_alike<silu>)));
  library.def("silu_slope", torch::dispatch(c10::kCPU, TORCH_FN(everywhere_alike<silu_slope>)));
}

} // namespace packc
