// The causal convolution over documents, and its backward. causal_conv1d.h says how the work is cut.

#include <torch/library.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "causal_conv1d_bwd.h"
#include "causal_conv1d_fwd.h"

namespace packc {
namespace {

void check_shapes(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& initial, int64_t N) {
  const int64_t D = x.size(2), W = weight.size(1);
  TORCH_CHECK_VALUE(weight.size(0) == D, "weight must be (D, W) with D = ", D, ", not ", weight.sizes());
  TORCH_CHECK_VALUE(!bias || bias->sizes() == at::IntArrayRef({D}), "bias must be (", D, ",), not ", bias->sizes());
  TORCH_CHECK_VALUE(
      !initial || initial->sizes() == at::IntArrayRef({N, D, W - 1}),
      "initial_state must be (N, D, W - 1) = (", N, ", ", D, ", ", W - 1, "), not ", initial->sizes());
}

// Calls body with the width and the activation as compile-time constants; 0 stands for a width of any size.
template <typename Body>
void with_constants(int64_t W, bool silu, const Body& body) {
  const auto with_width = [&](auto activation) {
    switch (W) {
      case 2:
        return body(std::integral_constant<int, 2>(), activation);
      case 3:
        return body(std::integral_constant<int, 3>(), activation);
      case 4:
        return body(std::integral_constant<int, 4>(), activation);
      default:
        return body(std::integral_constant<int, 0>(), activation);
    }
  };
  silu ? with_width(std::true_type()) : with_width(std::false_type());
}

std::tuple<Tensor, Tensor> causal_conv1d(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, std::optional<std::string_view> activation,
    const OptionalTensor& cu_seqlens, const OptionalTensor& initial_state, bool output_final_state) {
  const Documents documents(cu_seqlens, x.size(0), x.size(1));
  check_shapes(x, weight, bias, initial_state, documents.count());
  const Filter filter(weight, bias);
  const State initial(initial_state);
  Tensor out = at::empty(x.sizes(), x.options());
  Tensor state = at::empty(
      {output_final_state ? documents.count() : 0, filter.D, filter.W - 1}, x.options().dtype(at::kFloat));
  with_dtype(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    with_constants(filter.W, activation.has_value(), [&](auto width, auto silu) {
      forward<T, width.value, silu.value>(x, filter, documents, initial, out);
    });
    if (output_final_state && filter.W > 1)
      final_states<T>(x, documents, initial, filter.W, state);
  });
  return {out, state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv1d_bwd(
    const Tensor& dout, const OptionalTensor& dfinal_state, const Tensor& x, const Tensor& weight,
    const OptionalTensor& bias, std::optional<std::string_view> activation, const OptionalTensor& cu_seqlens,
    const OptionalTensor& initial_state) {
  const Documents documents(cu_seqlens, x.size(0), x.size(1));
  const int64_t N = documents.count();
  check_shapes(x, weight, bias, initial_state, N);
  const Filter filter(weight, bias);
  const State initial(initial_state), dfinal(dfinal_state);
  const auto fp32 = x.options().dtype(at::kFloat);
  Grads grads;
  grads.dx = at::empty(x.sizes(), x.options());
  grads.sums = at::zeros({at::divup(documents.tokens(), kConvolutionChunk), filter.W + 1, filter.width}, fp32);
  if (initial) {
    grads.dinitial = at::zeros({N, filter.D, filter.W - 1}, fp32);
    if (dfinal)
      states_handed_on(dfinal, documents, filter.W, grads.dinitial);
  }
  with_dtype(x.scalar_type(), [&](auto zero) {
    with_constants(filter.W, activation.has_value(), [&](auto width, auto silu) {
      backward<decltype(zero), width.value, silu.value>(dout, dfinal, x, filter, documents, initial, grads);
    });
  });
  const auto [dweight, dbias] = parameter_totals(grads.sums, filter.D);
  const auto none = [&] { return at::empty({0}, fp32); };
  return {
      grads.dx,
      dweight.to(weight.scalar_type()).contiguous(),
      bias ? dbias.to(bias->scalar_type(), false, true) : none(),
      initial ? grads.dinitial.to(initial_state->scalar_type()) : none()};
}

TORCH_LIBRARY_FRAGMENT(packc_cpu, library) {
  library.def("causal_conv1d", torch::dispatch(c10::kCPU, TORCH_FN(causal_conv1d)));
  library.def("causal_conv1d_bwd", torch::dispatch(c10::kCPU, TORCH_FN(causal_conv1d_bwd)));
}

} // namespace
} // namespace packc
