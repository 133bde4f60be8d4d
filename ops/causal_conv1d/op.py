"""``packc::causal_conv1d`` and its backward: schema, implementations, fakes, FLOPs, autograd.

The op keeps nothing but its inputs for the backward, which computes the pre-activation again.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor

from packc.ops import derivatives, dispatch, documents
from packc.ops.causal_conv1d import cpu, reference
from packc.ops.flops import flop_formula
from packc.ops.mixer import Mixer, declare

_library = torch.library.Library("packc", "FRAGMENT")
# Any strides are read in place, and those of the results do not depend on them: Inductor need not copy anything.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
_library.define(
    "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, str? activation, Tensor? cu_seqlens, Tensor? initial_state, "
    "bool output_final_state) -> (Tensor out, Tensor final_state)",
    tags=_TAGS,
)
_library.define(
    "causal_conv1d_bwd(Tensor dout, Tensor? dfinal_state, Tensor x, Tensor weight, Tensor? bias, str? activation, "
    "Tensor? cu_seqlens, Tensor? initial_state) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_state)",
    tags=_TAGS,
)
declare(Mixer("causal_conv1d", per_token=("x",), enter_state=("x",), gives_zero=("x",), unless=("bias",)))


def _forward(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _implementation(x).causal_conv1d(x, *args)


def _backward(dout: Tensor, dfinal_state: Tensor | None, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return _implementation(x).causal_conv1d_bwd(dout, dfinal_state, x, *args)


def _implementation(x: Tensor) -> Any:
    choice = dispatch.choose("causal_conv1d", x)
    if choice == "triton":
        from packc.ops.causal_conv1d import triton_op

        return triton_op
    return cpu if choice == "cpu" else reference


for _device in ("CPU", "CUDA"):
    _library.impl("causal_conv1d", _forward, _device)
    _library.impl("causal_conv1d_bwd", _backward, _device)


@torch.library.register_fake("packc::causal_conv1d", lib=_library)
def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor]:
    D, W = weight.shape
    N = documents.count(cu_seqlens, x) if output_final_state else 0
    return x.new_empty(x.shape), x.new_empty((N, D, W - 1), dtype=_state_dtype(x))


@torch.library.register_fake("packc::causal_conv1d_bwd", lib=_library)
def _backward_fake(
    dout: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    none = x.new_empty((0,), dtype=_state_dtype(x))
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        none if bias is None else bias.new_empty(bias.shape),
        x.new_empty((0,), dtype=_state_dtype(x))
        if initial_state is None
        else initial_state.new_empty(initial_state.shape),
    )


def _state_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@flop_formula(torch.ops.packc.causal_conv1d)
def _forward_flops(x_shape: tuple[int, ...], weight_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    return 2 * prod(x_shape) * weight_shape[1]


@flop_formula(torch.ops.packc.causal_conv1d_bwd)
def _backward_flops(
    dout_shape: Any, dfinal_shape: Any, x_shape: tuple[int, ...], weight_shape: tuple[int, ...], *_: Any, **__: Any
) -> int:
    # The pre-activation once more, and the gradients of the input and of the taps.
    return 3 * _forward_flops(x_shape, weight_shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, ctx.activation, cu_seqlens, initial_state, ctx.output_final_state = inputs
    ctx.save_for_backward(x, weight, bias, cu_seqlens, initial_state)


def _differentiate(ctx: Any, dout: Tensor, dfinal_state: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, cu_seqlens, initial_state = ctx.saved_tensors
    dx, dweight, dbias, dinitial_state = torch.ops.packc.causal_conv1d_bwd.default(
        dout,
        dfinal_state if ctx.output_final_state else None,
        x,
        weight,
        bias,
        ctx.activation,
        cu_seqlens,
        initial_state,
    )
    return (
        dx,
        dweight,
        None if bias is None else dbias,
        None,
        None,
        None if initial_state is None else dinitial_state,
        None,
    )


derivatives.register(_library, "causal_conv1d", _forward, _setup_context, _differentiate)
derivatives.register_gradients(_library, "causal_conv1d_bwd", _backward)
