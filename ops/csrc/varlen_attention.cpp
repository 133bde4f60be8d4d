// packc_cpu::varlen_attention and its backward.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "varlen_attention_bwd.h"
#include "varlen_attention_fwd.h"

namespace packc {
namespace {

Attention problem(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    bool causal,
    std::optional<double> scale,
    std::optional<int64_t> window) {
  return {
      Heads(q),
      Heads(k),
      Heads(v),
      static_cast<float>(scale.value_or(1 / std::sqrt(static_cast<double>(q.size(3))))),
      Seen(causal, window),
      q.size(2),
      k.size(2)};
}

int64_t threads_for_pairs(const Attention& p, const Documents& documents) {
  int64_t pairs = 0;
  for (int64_t n = 0; n < documents.count(); ++n)
    pairs += documents.length(n) * documents.length(n);
  return threads_for(pairs * p.heads * (p.K() + p.V()));
}

std::tuple<Tensor, Tensor> varlen_attention(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& cu_seqlens,
    bool causal,
    std::optional<double> scale,
    std::optional<int64_t> window,
    double dropout_p,
    const std::optional<Tensor>& seed) {
  const int64_t T = q.size(1);
  const Documents documents(cu_seqlens, 1, T);
  const Chunks chunks(documents);
  const Attention p = problem(q, k, v, causal, scale, window);
  const Dropout dropout(dropout_p, seed);
  Tensor out = at::empty({1, T, p.heads, p.V()}, q.options());
  Tensor logsumexp = at::empty({p.heads, T}, q.options().dtype(at::kFloat));
  const Heads outs(out);
  float* logsumexps = logsumexp.mutable_data_ptr<float>();
  const auto scratch = [&] { return AttentionForward(p, dropout, chunks, outs, logsumexps, T); };
  const int64_t tasks = static_cast<int64_t>(chunks.all.size()) * p.groups;
  for_each_task(threads_for_pairs(p, documents), tasks, scratch, [&](int64_t task, AttentionForward& forward) {
    forward.run(task / p.groups, task % p.groups);
  });
  return {out, logsumexp};
}

std::tuple<Tensor, Tensor, Tensor> varlen_attention_bwd(
    const Tensor& dout,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& out,
    const Tensor& logsumexp,
    const Tensor& cu_seqlens,
    bool causal,
    std::optional<double> scale,
    std::optional<int64_t> window,
    double dropout_p,
    const std::optional<Tensor>& seed) {
  const Documents documents(cu_seqlens, 1, q.size(1));
  const Chunks chunks(documents);
  const Attention p = problem(q, k, v, causal, scale, window);
  const Dropout dropout(dropout_p, seed);
  int64_t longest = 0, full = 0;
  for (int64_t n = 0; n < documents.count(); ++n) {
    longest = std::max(longest, documents.length(n));
    full += documents.length(n) > 0;
  }
  // Long documents may be few, and so may groups.
  const bool by_head = p.heads > p.groups && full * p.groups < at::get_num_threads();
  const int64_t places = by_head ? p.heads : p.groups, heads = p.heads / places;
  const auto like = [&](const Tensor& x) {
    return at::empty({1, x.size(1), places, x.size(3)}, by_head ? x.options().dtype(at::kFloat) : x.options());
  };
  Tensor dq = at::empty(q.sizes(), q.options()), dk = like(k), dv = like(v);
  const Tensor logsumexps = logsumexp.contiguous();
  const AttentionBackward::Tensors tensors{
      Heads(dout), Heads(out), logsumexps.const_data_ptr<float>(), Heads(dq), Heads(dk), Heads(dv), q.size(1)};
  const auto scratch = [&] { return AttentionBackward(p, dropout, chunks, tensors, longest); };
  for_each_task(threads_for_pairs(p, documents), documents.count() * places, scratch, [&](int64_t task, AttentionBackward& backward) {
    const int64_t place = task % places;
    backward.run(task / places, Range{place * heads, (place + 1) * heads}, place);
  });
  if (by_head)
    return {dq, sum_of_heads(dk, p.groups, k.scalar_type()), sum_of_heads(dv, p.groups, v.scalar_type())};
  return {dq, dk, dv};
}

} // namespace

TORCH_LIBRARY_FRAGMENT(packc_cpu, library) {
  library.def(
      "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, bool causal, float? scale, int? window, "
      "float dropout_p, Tensor? seed) -> (Tensor, Tensor)");
  library.def(
      "varlen_attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor logsumexp, "
      "Tensor cu_seqlens, bool causal, float? scale, int? window, float dropout_p, Tensor? seed) "
      "-> (Tensor, Tensor, Tensor)");
  library.impl("varlen_attention", c10::DispatchKey::CPU, TORCH_FN(varlen_attention));
  library.impl("varlen_attention_bwd", c10::DispatchKey::CPU, TORCH_FN(varlen_attention_bwd));
}

} // namespace packc
