// packc_cpu::gated_delta_rule and its backward, chunked, with a decay per head or per channel.
#include <ATen/ops/empty.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "gated_delta_rule_channel_gate.h"
#include "gated_delta_rule_fwd.h"
#include "gated_delta_rule_gradients.h"
#include "gated_delta_rule_head_gate.h"
#include "phases.h"

namespace packc {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

Tensor or_undefined(const Optional& x) {
  return x.value_or(Tensor());
}

GatedDeltaRule problem(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& beta, double scale) {
  return {
      Heads(q),
      Heads(k),
      Heads(v),
      PerHead(beta),
      static_cast<float>(scale),
      v.size(2),
      q.size(2),
      q.size(1),
      at::divup(q.size(1), kChunk)};
}

Tensor new_states(const Tensor& v, int64_t documents, int64_t K) {
  return at::empty({documents, v.size(2), K, v.size(3)}, v.options().dtype(at::kFloat));
}

// Memory of the kernel's own, with a tile for every chunk and head.
Tensor workspace(const GatedDeltaRule& p, const Tensor& v, int64_t width) {
  return at::empty({p.tiles(v.size(0), width)}, v.options().dtype(at::kFloat));
}

// Calls body with a type: of the gate that g asks for.
template <typename Body>
void with_gate(const Tensor& g, const Body& body) {
  if (g.dim() == 4)
    body(std::type_identity<ChannelGate>());
  else
    body(std::type_identity<HeadGate>());
}

// The second phases, a document after the other.
template <typename Gate>
void correct_states(
    const GatedDeltaRule& p,
    const Chunks& chunks,
    const Tensor& g,
    States initial,
    States final,
    const float* resolvents,
    float* chunk_states,
    float* corrections) {
  const auto make = [&](int64_t columns) { return CorrectState<Gate>(p, g, resolvents, corrections, columns); };
  carry_along_documents(
      p, chunks, false, initial, final, chunk_states, make, [](const Carried& at, auto& state) { state.step(at); });
}

template <typename Gate>
void correct_state_gradients(
    const GatedDeltaRule& p,
    const Chunks& chunks,
    const Tensor& g,
    const Heads& dout,
    States dfinal,
    States dinitial,
    Workspace w,
    float* dstates) {
  const auto make = [&](int64_t columns) { return CorrectStateGradient<Gate>(p, g, dout, w, columns); };
  carry_along_documents(
      p, chunks, true, dfinal, dinitial, dstates, make, [](const Carried& at, auto& state) { state.step(at); });
}

// The forward's phases of a chunk, with what they hand on.
template <typename Gate>
struct ForwardWalk {
  GatedDeltaRule p;
  Tiles tiles;
  float *resolvents, *corrections, *chunk_states;
  ResolveChunk<Gate> resolved;
  CorrectState<Gate> state;
  CorrectOutputs<Gate> outputs;

  ForwardWalk(const GatedDeltaRule& all, const Tensor& g, States initial, float* chunk_states, const Heads& out)
      : p(all.for_walking()),
        tiles(p.tiles_of_group(kChunk) + p.tiles_of_group(padded(p.V()))),
        resolvents(tiles.take(p.tiles_of_group(kChunk))),
        corrections(tiles.take(p.tiles_of_group(padded(p.V())))),
        chunk_states(chunk_states),
        resolved(p, g, resolvents),
        state(p, g, resolvents, corrections, padded(p.V())),
        outputs(p, g, initial, chunk_states, corrections, out) {}

  void before(const Chunk& chunk, int64_t group) {
    resolved.run(chunk, group);
  }
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
template <typename Gate>
struct BackwardWalk {
  GatedDeltaRule p;
  Tiles tiles;
  float* dstates;
  Workspace w;
  RecomputeErrors<Gate> errors;
  CorrectStateGradient<Gate> state;
  GatedDeltaRuleChunk<Gate> gradients;

  BackwardWalk(
      const GatedDeltaRule& all,
      const GatedDeltaRuleGradients<Gate>& gradients,
      const Tensor& g,
      const Heads& dout,
      States initial,
      States dfinal,
      const float* chunk_states)
      : p(all.for_walking()),
        tiles(
            p.heads / p.groups * p.K() * padded(p.V()) + p.tiles_of_group(kChunk) +
            2 * p.tiles_of_group(padded(p.V()))),
        dstates(tiles.take(p.heads / p.groups * p.K() * padded(p.V()))),
        w{tiles.take(p.tiles_of_group(kChunk)),
          tiles.take(p.tiles_of_group(padded(p.V()))),
          tiles.take(p.tiles_of_group(padded(p.V())))},
        errors(p, g, dout, initial, chunk_states, w),
        state(p, g, dout, w, padded(p.V())),
        gradients(p, gradients, g, dout, initial, dfinal, chunk_states, dstates, w) {}

  void before(const Chunk& chunk, int64_t group) {
    errors.run(chunk, group);
  }
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

std::tuple<Tensor, Tensor, Tensor> gated_delta_rule(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& g,
    const Tensor& beta,
    double scale,
    const Optional& cu_seqlens,
    const Optional& initial_state,
    bool output_final_state) {
  const Documents documents(cu_seqlens, v.size(0), v.size(1));
  const Chunks chunks(documents);
  const GatedDeltaRule p = problem(q, k, v, beta, scale);
  const States initial(or_undefined(initial_state));
  Tensor out = at::empty(v.sizes(), v.options());
  Tensor final = new_states(v, output_final_state ? documents.count() : 0, p.K());
  Tensor chunk_states =
      at::empty({v.size(0) * p.slots * p.heads * p.K() * padded(p.V())}, v.options().dtype(at::kFloat));
  const States finals(output_final_state ? final : Tensor());
  float* states = chunk_states.mutable_data_ptr<float>();
  const Heads results(out);
  clear_unused(p, chunks, v.size(0), states);
  with_gate(g, [&]<typename Gate>(std::type_identity<Gate>) {
    if (worth_walking(p, chunks)) {
      const auto walk = [&] { return ForwardWalk<Gate>(p, g, initial, states, results); };
      walk_documents(p, chunks, false, initial, finals, walk);
      return;
    }
    Tensor resolvents = workspace(p, v, kChunk), corrections = workspace(p, v, padded(p.V()));
    float *r = resolvents.mutable_data_ptr<float>(), *u = corrections.mutable_data_ptr<float>();
    for_each_chunk(p, chunks, [&] { return ResolveChunk<Gate>(p, g, r); });
    correct_states<Gate>(p, chunks, g, initial, finals, r, states, u);
    for_each_chunk(p, chunks, [&] { return CorrectOutputs<Gate>(p, g, initial, states, u, results); });
  });
  return {out, final, chunk_states};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_delta_rule_bwd(
    const Tensor& dout,
    const Optional& dfinal_state,
    const Tensor& chunk_states,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& g,
    const Tensor& beta,
    double scale,
    const Optional& cu_seqlens,
    const Optional& initial_state) {
  const Documents documents(cu_seqlens, v.size(0), v.size(1));
  const Chunks chunks(documents);
  const GatedDeltaRule p = problem(q, k, v, beta, scale);
  Tensor dq = at::empty(q.sizes(), q.options()), dk = at::empty(k.sizes(), k.options());
  Tensor dv = at::empty(v.sizes(), v.options());
  Tensor dg = at::empty(g.sizes(), g.options()), dbeta = at::empty(beta.sizes(), beta.options());
  Tensor dinitial = initial_state ? new_states(v, documents.count(), p.K()) : at::empty({0}, g.options());
  const States initial(or_undefined(initial_state)), dfinal(or_undefined(dfinal_state));
  const States dinitials(initial_state ? dinitial : Tensor());
  const Heads douts(dout);
  const float* states = chunk_states.const_data_ptr<float>();
  with_gate(g, [&]<typename Gate>(std::type_identity<Gate>) {
    using Gradient = typename Gate::Gradient;
    const GatedDeltaRuleGradients<Gate> gradients{Heads(dq), Heads(dk), Heads(dv), Gradient(dg), PerHead(dbeta)};
    if (worth_walking(p, chunks)) {
      const auto walk = [&] { return BackwardWalk<Gate>(p, gradients, g, douts, initial, dfinal, states); };
      walk_documents(p, chunks, true, dfinal, dinitials, walk);
      return;
    }
    Tensor dstates = at::empty(chunk_states.sizes(), chunk_states.options());
    Tensor resolvents = workspace(p, v, kChunk), errors = workspace(p, v, padded(p.V()));
    Tensor du = workspace(p, v, padded(p.V()));
    const Workspace w{
        resolvents.mutable_data_ptr<float>(), errors.mutable_data_ptr<float>(), du.mutable_data_ptr<float>()};
    float* dkept = dstates.mutable_data_ptr<float>();
    for_each_chunk(p, chunks, [&] { return RecomputeErrors<Gate>(p, g, douts, initial, states, w); });
    correct_state_gradients<Gate>(p, chunks, g, douts, dfinal, dinitials, w, dkept);
    for_each_chunk(p, chunks, [&] {
      return GatedDeltaRuleChunk<Gate>(p, gradients, g, douts, initial, dfinal, states, dkept, w);
    });
  });
  return {dq, dk, dv, dg, dbeta, dinitial};
}

// Tokens that a summary takes at a time, so that its workspace does not grow with a segment.
constexpr int64_t kPiece = 8 * kChunk;

// Of tokens begin .. L of the one row: the matrix (1, H, K, K) by which they multiply a state, and what they leave. The
// matrix is what becomes of the unit matrix without values. It costs as much as the state, unless decays let nothing
// through: then no more than the chunks that it takes them.
std::tuple<Tensor, Tensor> gated_delta_rule_summary(
    const Tensor& all_k, const Tensor& all_v, const Tensor& all_g, const Tensor& all_betas, const Tensor& begin) {
  const int64_t L = all_v.size(1), H = all_v.size(2), K = all_k.size(3);
  const Tensor no_value = at::zeros({1, 1, 1, K}, all_v.options());
  Tensor state, transition = at::eye(K, all_v.options().dtype(at::kFloat)).expand({1, H, K, K});
  int64_t first = begin.item<int64_t>();
  do {
    const int64_t end = std::min(first + kPiece, L);
    const auto piece = [&](const Tensor& x) { return x.slice(1, first, end); };
    const Tensor k = piece(all_k), v = piece(all_v), g = piece(all_g), beta = piece(all_betas);
    const Tensor no_values = no_value.expand({1, end - first, H, K});
    const Chunks chunks(Documents(std::nullopt, 1, end - first));
    const GatedDeltaRule p = problem(k, k, v, beta, 1);
    GatedDeltaRule of_unit = problem(k, k, no_values, beta, 1);
    of_unit.no_values = true;
    Tensor next = new_states(v, 1, K), through = new_states(no_values, 1, K), resolvents = workspace(p, v, kChunk);
    with_gate(g, [&]<typename Gate>(std::type_identity<Gate>) {
      float* r = resolvents.mutable_data_ptr<float>();
      for_each_chunk(p, chunks, [&] { return ResolveChunk<Gate>(p, g, r); });
      correct_states<Gate>(p, chunks, g, States(state), States(next), r, nullptr, nullptr);
      correct_states<Gate>(of_unit, chunks, g, States(transition), States(through), r, nullptr, nullptr);
    });
    state = next;
    transition = through;
    first = end;
  } while (first < L);
  return {transition, state};
}

// Of tokens 0 .. end of the one row: the gradient of the state that enters.
Tensor gated_delta_rule_adjoint(
    const Tensor& all_douts,
    const Tensor& all_q,
    const Tensor& all_k,
    const Tensor& all_g,
    const Tensor& all_betas,
    double scale,
    const Tensor& end) {
  Tensor dstate;
  int64_t last = end.item<int64_t>();
  do {
    // Chunks are cut from the first token on.
    const int64_t first = std::max<int64_t>(last - 1, 0) / kPiece * kPiece;
    const auto piece = [&](const Tensor& x) { return x.slice(1, first, last); };
    const Tensor dout = piece(all_douts), k = piece(all_k), g = piece(all_g);
    const Chunks chunks(Documents(std::nullopt, 1, last - first));
    const GatedDeltaRule p = problem(piece(all_q), k, dout, piece(all_betas), scale);
    Tensor before = new_states(dout, 1, p.K());
    Tensor resolvents = workspace(p, dout, kChunk), du = workspace(p, dout, padded(p.V()));
    const Workspace w{resolvents.mutable_data_ptr<float>(), nullptr, du.mutable_data_ptr<float>()};
    const States none{Tensor()};
    const Heads douts(dout);
    with_gate(g, [&]<typename Gate>(std::type_identity<Gate>) {
      for_each_chunk(p, chunks, [&] { return RecomputeErrors<Gate>(p, g, douts, none, nullptr, w); });
      correct_state_gradients<Gate>(p, chunks, g, douts, States(dstate), States(before), w, nullptr);
    });
    dstate = before;
    last = first;
  } while (last > 0);
  return dstate;
}

} // namespace

TORCH_LIBRARY_FRAGMENT(packc_cpu, library) {
  library.def("gated_delta_rule", torch::dispatch(c10::kCPU, TORCH_FN(gated_delta_rule)));
  library.def("gated_delta_rule_bwd", torch::dispatch(c10::kCPU, TORCH_FN(gated_delta_rule_bwd)));
  library.def("gated_delta_rule_summary", torch::dispatch(c10::kCPU, TORCH_FN(gated_delta_rule_summary)));
  library.def("gated_delta_rule_adjoint", torch::dispatch(c10::kCPU, TORCH_FN(gated_delta_rule_adjoint)));
}

} // namespace packc
