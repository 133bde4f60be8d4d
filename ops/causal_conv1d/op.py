"""``packc::causal_conv1d`` and ``packc::causal_conv1d_bwd``.

The op keeps nothing but its inputs for the backward, which computes the pre-activation again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from packc.ops import documents
from packc.ops.mixer import Mixer, state_dtype
from packc.ops.registration import declare
from packc.ops.shapes import FLOATING
from packc.ops.summary import Summary, add


def _check(op: str, tensors: Mapping[str, Tensor | None], cu_seqlens: Tensor | None) -> None:
    x, weight, bias, initial_state = tensors["x"], tensors["weight"], tensors["bias"], tensors["initial_state"]
    assert x is not None
    assert weight is not None

    def refused(x: Tensor, expected: str, error: type[Exception] = ValueError) -> Exception:
        return error(f"{op}: {expected}; got {tuple(x.shape)} of {x.dtype}")

    if x.ndim != 3 or x.dtype not in FLOATING:
        raise refused(x, "x must be (B, L, D) and floating", ValueError if x.dtype in FLOATING else TypeError)
    D = x.shape[2]
    if weight.ndim != 2 or documents.differ(weight.shape[0], D) or weight.shape[1] < 1:
        raise refused(weight, f"weight must be (D, W) with D = {D} and W >= 1")
    if bias is not None and (bias.ndim != 1 or documents.differ(bias.shape[0], D)):
        raise refused(bias, f"bias must be (D,) with D = {D}")
    documents.check_cu_seqlens(cu_seqlens, x)
    if initial_state is not None:
        sizes = (documents.count(cu_seqlens, x), D, weight.shape[1] - 1)
        if initial_state.ndim != 3 or any(map(documents.differ, initial_state.shape, sizes)):
            raise refused(initial_state, f"initial_state must be (N, D, W - 1) = {sizes}")
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOATING:
            raise refused(tensor, f"{name} must be floating", TypeError)


def _forward(
    kernels: Any, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, *rest: Any
) -> tuple[Tensor, ...]:
    return kernels.forward(x, weight, bias, activation is not None, *rest)


def _backward(
    kernels: Any,
    dout: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    *rest: Any,
) -> Sequence[Tensor | None]:
    return kernels.backward(dout, dfinal_state, x, weight, bias, activation is not None, *rest)


# A segment shifts the inputs that came before it out of the state, and its own in: how many it has is the transition.


def _summary(kernels: Any, x: Tensor, weight: Tensor, begin: Tensor) -> tuple[Tensor, Tensor]:
    L, D = x.shape[1:]
    size = weight.shape[1] - 1
    last = min(L, size)
    state = x.new_zeros((1, D, size), dtype=state_dtype(x, weight))
    is_of_segment = torch.arange(L - last, L, device=x.device) >= begin
    state[..., size - last :] = torch.where(is_of_segment, x[:, L - last :].mT, 0)
    return (L - begin).clamp(max=size).to(state.dtype), state


def _through(transition: Tensor, state: Tensor, _: Any) -> Tensor:
    return _shifted(state, transition.long())


def _back_through(transition: Tensor, dstate: Tensor, _: Any) -> Tensor:
    return _shifted(dstate, -transition.long())


def _shifted(state: Tensor, by: Tensor) -> Tensor:
    """``state[..., w + by]``, and zero where there is none."""
    size = state.shape[-1]
    places = torch.arange(size, device=state.device) + by.view(-1, 1, 1)
    found = state.gather(-1, places.clamp(0, max(size - 1, 0)).expand(state.shape))
    return torch.where((places >= 0) & (places < size), found, 0)


def _leave(gradients: dict[str, Tensor], dstate: Tensor, begin: Tensor) -> None:
    dx, size = gradients["x"], dstate.shape[-1]
    if guard_or_false(dx.shape[1] == 0):
        return
    places = torch.arange(size, device=dx.device) + (dx.shape[1] - size)
    added = torch.where(places >= begin, dstate, 0).mT.to(dx.dtype)
    dx.index_add_(1, places.clamp(min=0), added)


def _flops(B: int, L: int, D: int, W: int, **_: Any) -> int:
    return 2 * B * L * D * W


MIXER = declare(
    Mixer(
        "causal_conv1d",
        tensors={"x": "B L D", "weight": "D W", "bias?": "D"},
        like="x",
        options={"activation": "str?"},
        state="D W-1",
        enter_state=("x",),
        gives_zero=("x",),
        unless=("bias",),
        check=_check,
        forward=_forward,
        backward=_backward,
        flops=_flops,
        # The pre-activation once more, and the gradients of the input and of the taps.
        backward_flops=lambda **sizes: 3 * _flops(**sizes),
        summary=Summary(
            takes=("x", "weight"),
            adjoint_takes=None,
            transition="",
            through=_through,
            transposed=_back_through,
            compose=add,
            summary=_summary,
            leave=_leave,
            flops=lambda **_: 0,
        ),
        # Any strides are read in place, and those of the results do not depend on them: Inductor need not copy.
        tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
    )
)
