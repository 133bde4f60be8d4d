// The selective scan of Mamba-1 over documents, and its backward. selective_scan.h says how the work is cut.

#include <torch/library.h>

#include <tuple>

#include "selective_scan_bwd.h"
#include "selective_scan_fwd.h"
#include "selective_scan_summary.h"
#include "tasks.h"

namespace packc {
namespace {

// body(worker, group, bundle of blocks) for all pairs of group and block, in parallel; every thread makes a worker.
template <typename Make, typename Body>
void for_each_bundle(
    const std::vector<Group>& groups, const std::vector<ChannelBlock>& blocks, const Make& make, const Body& body) {
  const int64_t count = static_cast<int64_t>(blocks.size()), units = static_cast<int64_t>(groups.size()) * count;
  // Groups differ in length: there must be more bundles than threads for all to end together.
  const int64_t size = std::clamp<int64_t>(units / (2 * at::get_num_threads()), 1, kBundle);
  const int64_t bundles = at::divup(count, size);
  const int64_t tasks = static_cast<int64_t>(groups.size()) * bundles;
  for_each_task(at::get_num_threads(), tasks, make, [&](int64_t task, auto& worker) {
    const int64_t block = task % bundles * size;
    body(worker, task / bundles, std::span(blocks).subspan(block, std::min(size, count - block)));
  });
}

// An empty document ends as it began.
void hand_on_states(const Documents& documents, const OptionalTensor& from, const Tensor& to) {
  for (int64_t n = 0; n < documents.count(); ++n) {
    if (documents.length(n) > 0)
      continue;
    if (from)
      to.select(0, n).copy_(from->select(0, n));
    else
      to.select(0, n).zero_();
  }
}

std::tuple<Tensor, Tensor, Tensor> selective_scan(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D,
    const OptionalTensor& z, const OptionalTensor& delta_bias, bool delta_softplus, const OptionalTensor& cu_seqlens,
    const OptionalTensor& initial_state, bool output_final_state) {
  const Problem p(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state);
  const Documents documents(cu_seqlens, u.size(0), u.size(1));
  check(p, documents);
  const auto fp32 = u.options().dtype(at::kFloat);
  const ForwardOutputs outputs{
      at::empty(u.sizes(), u.options()),
      at::empty({output_final_state ? documents.count() : 0, p.channels, p.N}, fp32),
      at::empty({u.size(0) * at::divup(u.size(1), kSelectiveScanChunk) * p.N * p.channels}, fp32)};
  if (output_final_state)
    hand_on_states(documents, p.initial_state, outputs.final_state);
  const std::vector<Group> groups = groups_of(documents);
  for_each_bundle(
      groups,
      channel_blocks(p.channels, p.G),
      [&] { return Forward(p, outputs); },
      [&](Forward& worker, int64_t group, auto blocks) { worker.run(groups[group], blocks); });
  return {outputs.out, outputs.final_state, outputs.chunk_states};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> selective_scan_bwd(
    const Tensor& dout, const OptionalTensor& dfinal_state, const Tensor& chunk_states, const Tensor& u,
    const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D,
    const OptionalTensor& z, const OptionalTensor& delta_bias, bool delta_softplus, const OptionalTensor& cu_seqlens,
    const OptionalTensor& initial_state, bool channel_first_ddelta) {
  const Problem p(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state);
  const Documents documents(cu_seqlens, u.size(0), u.size(1));
  check(p, documents);
  check_sizes("dout", dout, u.sizes());
  if (dfinal_state)
    check_sizes("dfinal_state", *dfinal_state, {documents.count(), p.channels, p.N});
  check_sizes("chunk_states", chunk_states, {u.size(0) * at::divup(u.size(1), kSelectiveScanChunk) * p.N * p.channels});
  const auto fp32 = u.options().dtype(at::kFloat);
  const int64_t rows = u.size(0), L = u.size(1);
  const std::vector<Group> groups = groups_of(documents);
  const std::vector<ChannelBlock> blocks = channel_blocks(p.channels, p.G);
  const int64_t count = static_cast<int64_t>(groups.size());

  const auto none = [&] { return at::empty({0}, fp32); };
  const BackwardOutputs grads{
      at::empty(u.sizes(), u.options()),
      channel_first_ddelta ? at::empty({rows, p.channels, L}, delta.options()).transpose(1, 2)
                           : at::empty(delta.sizes(), delta.options()),
      z ? at::empty(z->sizes(), z->options()) : none(),
      at::empty({static_cast<int64_t>(blocks.size()), rows, L, 2, p.N}, fp32),
      at::empty({count, p.N, p.channels}, fp32),
      at::empty({count, 2, p.channels}, fp32),
      initial_state ? at::empty({documents.count(), p.channels, p.N}, fp32) : none()};
  const OptionalTensor dfinal = Problem::fp32(dfinal_state);
  if (initial_state)
    hand_on_states(documents, dfinal, grads.dinitial_state);
  for_each_bundle(
      groups,
      blocks,
      [&] { return Backward(p, dout, dfinal, chunk_states, grads); },
      [&](Backward& worker, int64_t group, auto bundle) { worker.run(groups[group], group, bundle); });

  const auto [dB, dC] = sum_over_blocks(p, grads.dBC);
  return {
      grads.du,
      grads.ddelta,
      sum_over_groups(grads.dA, 0, A),
      dB.view(B.sizes()),
      dC.view(C.sizes()),
      D ? sum_over_groups(grads.dparameters, 0, *D) : none(),
      grads.dz,
      delta_bias ? sum_over_groups(grads.dparameters, 1, *delta_bias) : none(),
      initial_state ? grads.dinitial_state.to(initial_state->scalar_type()) : none()};
}

template <bool backwards>
StateOutputs walk_states(const Problem& p) {
  const auto fp32 = p.u.options().dtype(at::kFloat);
  // Of no tokens, as which they begin.
  const StateOutputs outputs{at::zeros({1, p.channels}, fp32), at::zeros({1, p.channels, p.N}, fp32)};
  const std::vector<Group> groups = groups_of(Documents(std::nullopt, 1, p.u.size(1)));
  for_each_bundle(
      groups,
      channel_blocks(p.channels, p.G),
      [&] { return StateWalk<backwards>(p, outputs); },
      [&](StateWalk<backwards>& worker, int64_t group, auto blocks) { worker.run(groups[group], blocks); });
  return outputs;
}

// Of tokens begin .. L of the one row: the sum of their steps, and the state that they leave.
std::tuple<Tensor, Tensor> selective_scan_summary(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const OptionalTensor& delta_bias,
    bool delta_softplus, const Tensor& begin) {
  const int64_t first = begin.item<int64_t>();
  const auto segment = [&](const Tensor& x) { return x.slice(1, first); };
  const Tensor Bs = segment(B);
  const Problem p(
      segment(u), segment(delta), A, Bs, Bs, std::nullopt, std::nullopt, delta_bias, delta_softplus, std::nullopt);
  const StateOutputs outputs = walk_states<false>(p);
  return {outputs.steps, outputs.state};
}

// Of tokens 0 .. end of the one row: the gradient of the state that enters.
Tensor selective_scan_adjoint(
    const Tensor& dout, const Tensor& delta, const Tensor& A, const Tensor& C, const OptionalTensor& z,
    const OptionalTensor& delta_bias, bool delta_softplus, const Tensor& end) {
  const int64_t last = end.item<int64_t>();
  const auto segment = [&](const Tensor& x) { return x.slice(1, 0, last); };
  const Tensor Cs = segment(C);
  const OptionalTensor zs = z ? OptionalTensor(segment(*z)) : std::nullopt;
  const Problem p(
      segment(dout), segment(delta), A, Cs, Cs, std::nullopt, zs, delta_bias, delta_softplus, std::nullopt);
  return walk_states<true>(p).state;
}

TORCH_LIBRARY_FRAGMENT(packc_cpu, library) {
  library.def("selective_scan", torch::dispatch(c10::kCPU, TORCH_FN(selective_scan)));
  library.def("selective_scan_bwd", torch::dispatch(c10::kCPU, TORCH_FN(selective_scan_bwd)));
  library.def("selective_scan_summary", torch::dispatch(c10::kCPU, TORCH_FN(selective_scan_summary)));
  library.def("selective_scan_adjoint", torch::dispatch(c10::kCPU, TORCH_FN(selective_scan_adjoint)));
}

} // namespace
} // namespace packc
