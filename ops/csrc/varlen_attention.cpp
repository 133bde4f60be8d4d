// packc_cpu::varlen_attention, packc_cpu::attention_spans and their backwards.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "varlen_attention_bwd.h"
#include "varlen_attention_fwd.h"

namespace packc {
namespace {

using MaybeTensor = std::optional<Tensor>;

Attention problem(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const MaybeTensor& sinks,
    const MaybeTensor& bias,
    bool causal,
    std::optional<double> scale,
    std::optional<int64_t> window,
    std::optional<double> softcap) {
  return {
      Heads(q),
      Heads(k),
      Heads(v),
      static_cast<float>(scale.value_or(1 / std::sqrt(static_cast<double>(q.size(3))))),
      Seen(causal, window),
      q.size(2),
      k.size(2),
      static_cast<float>(softcap.value_or(0)),
      bias ? std::optional(Heads(*bias)) : std::nullopt,
      PerHead(sinks ? sinks->expand({1, q.size(1), q.size(2)}) : Tensor())};
}

// (1, T, H) -> (H,), one token after the other.
Tensor sum_over_tokens(const Tensor& of_tokens) {
  const int64_t T = of_tokens.size(1), H = of_tokens.size(2);
  Tensor sums = at::empty({H}, of_tokens.options());
  const float* from = of_tokens.const_data_ptr<float>();
  for (int64_t h = 0; h < H; ++h) {
    double sum = 0;
    for (int64_t t = 0; t < T; ++t)
      sum += from[t * H + h];
    sums.mutable_data_ptr<float>()[h] = static_cast<float>(sum);
  }
  return sums;
}

int64_t threads_for_pairs(const Attention& p, const Spans& spans) {
  int64_t pairs = 0;
  for (const Chunk& queries : spans.queries.all) {
    const Range keys = spans.keys_of(queries.document);
    pairs += queries.length * (keys.end - keys.begin);
  }
  return threads_for(pairs * p.heads * (p.K() + p.V()));
}

// What is in no span is zero.
Tensor memory(bool all_written, at::IntArrayRef sizes, const at::TensorOptions& options) {
  return all_written ? at::empty(sizes, options) : at::zeros(sizes, options);
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Attention& p, const Spans& spans, const Dropout& dropout) {
  const int64_t T = q.size(1);
  Tensor out = memory(spans.all_queries, {1, T, p.heads, p.V()}, q.options());
  Tensor logsumexp = memory(spans.all_queries, {p.heads, T}, q.options().dtype(at::kFloat));
  const Heads outs(out);
  float* logsumexps = logsumexp.mutable_data_ptr<float>();
  const auto scratch = [&] { return AttentionForward(p, dropout, spans, outs, logsumexps, T); };
  const int64_t tasks = static_cast<int64_t>(spans.queries.all.size()) * p.groups;
  for_each_task(threads_for_pairs(p, spans), tasks, scratch, [&](int64_t task, AttentionForward& forward) {
    forward.run(task / p.groups, task % p.groups);
  });
  return {out, logsumexp};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients backward(
    const Tensor& dout,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const MaybeTensor& sinks,
    const MaybeTensor& bias,
    const Tensor& out,
    const Tensor& logsumexp,
    const Attention& p,
    const Spans& spans,
    const Dropout& dropout) {
  int64_t longest = 0, full = 0;
  for (int64_t n = 0; n < spans.queries.count(); ++n) {
    const Range keys = spans.keys_of(n);
    longest = std::max(longest, keys.end - keys.begin);
    full += !keys.empty();
  }
  // Long documents may be few, and so may groups.
  const bool by_head = p.heads > p.groups && full * p.groups < at::get_num_threads();
  const int64_t places = by_head ? p.heads : p.groups, heads = p.heads / places;
  const auto like = [&](const Tensor& x) {
    const auto options = by_head ? x.options().dtype(at::kFloat) : x.options();
    return memory(spans.all_keys, {1, x.size(1), places, x.size(3)}, options);
  };
  Tensor dq = memory(spans.all_queries, q.sizes(), q.options()), dk = like(k), dv = like(v);
  Tensor dbias = bias ? at::zeros(bias->sizes(), bias->options()) : at::empty({0}, q.options());
  Tensor dsinks = sinks ? memory(spans.all_queries, {1, q.size(1), p.heads}, sinks->options()) : Tensor();
  const Tensor logsumexps = logsumexp.contiguous();
  const AttentionBackward::Tensors tensors{
      Heads(dout),
      Heads(out),
      logsumexps.const_data_ptr<float>(),
      Heads(dq),
      Heads(dk),
      Heads(dv),
      bias ? std::optional(Heads(dbias)) : std::nullopt,
      PerHead(dsinks),
      q.size(1)};
  const auto scratch = [&] { return AttentionBackward(p, dropout, spans, tensors, longest); };
  const int64_t threads = threads_for_pairs(p, spans);
  for_each_task(threads, spans.queries.count() * places, scratch, [&](int64_t task, AttentionBackward& backward) {
    const int64_t place = task % places;
    backward.run(task / places, Range{place * heads, (place + 1) * heads}, place);
  });
  if (by_head) {
    dk = sum_of_heads(dk, p.groups, k.scalar_type());
    dv = sum_of_heads(dv, p.groups, v.scalar_type());
  }
  if (!sinks)
    dsinks = at::empty({0}, q.options());
  else if (sinks->dim() == 1)
    dsinks = sum_over_tokens(dsinks);
  return {dq, dk, dv, dsinks, dbias};
}

std::tuple<Tensor, Tensor> varlen_attention(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const MaybeTensor& sinks,
    const MaybeTensor& bias,
    const Tensor& cu_seqlens,
    bool causal,
    std::optional<double> scale,
    std::optional<int64_t> window,
    double dropout_p,
    const MaybeTensor& seed,
    std::optional<double> softcap) {
  const Spans spans{Documents(cu_seqlens, 1, q.size(1))};
  return forward(q, problem(q, k, v, sinks, bias, causal, scale, window, softcap), spans, Dropout(dropout_p, seed));
}

Gradients varlen_attention_bwd(
    const Tensor& dout,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const MaybeTensor& sinks,
    const MaybeTensor& bias,
    const Tensor& out,
    const Tensor& logsumexp,
    const Tensor& cu_seqlens,
    bool causal,
    std::optional<double> scale,
    std::optional<int64_t> window,
    double dropout_p,
    const MaybeTensor& seed,
    std::optional<double> softcap) {
  const Spans spans{Documents(cu_seqlens, 1, q.size(1))};
  const Attention p = problem(q, k, v, sinks, bias, causal, scale, window, softcap);
  return backward(dout, q, k, v, sinks, bias, out, logsumexp, p, spans, Dropout(dropout_p, seed));
}

std::tuple<Tensor, Tensor> attention_spans(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const MaybeTensor& sinks,
    const MaybeTensor& bias,
    const Tensor& spans,
    bool causal,
    double scale,
    std::optional<int64_t> window,
    double dropout_p,
    const MaybeTensor& seed,
    std::optional<double> softcap) {
  const Spans given(spans, q.size(1), k.size(1));
  return forward(q, problem(q, k, v, sinks, bias, causal, scale, window, softcap), given, Dropout(dropout_p, seed));
}

Gradients attention_spans_bwd(
    const Tensor& dout,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const MaybeTensor& sinks,
    const MaybeTensor& bias,
    const Tensor& out,
    const Tensor& logsumexp,
    const Tensor& spans,
    bool causal,
    double scale,
    std::optional<int64_t> window,
    double dropout_p,
    const MaybeTensor& seed,
    std::optional<double> softcap) {
  const Spans given(spans, q.size(1), k.size(1));
  const Attention p = problem(q, k, v, sinks, bias, causal, scale, window, softcap);
  return backward(dout, q, k, v, sinks, bias, out, logsumexp, p, given, Dropout(dropout_p, seed));
}

} // namespace

TORCH_LIBRARY_FRAGMENT(packc_cpu, library) {
  library.def("varlen_attention", torch::dispatch(c10::kCPU, TORCH_FN(varlen_attention)));
  library.def("varlen_attention_bwd", torch::dispatch(c10::kCPU, TORCH_FN(varlen_attention_bwd)));
  library.def("attention_spans", torch::dispatch(c10::kCPU, TORCH_FN(attention_spans)));
  library.def("attention_spans_bwd", torch::dispatch(c10::kCPU, TORCH_FN(attention_spans_bwd)));
}

} // namespace packc
