"""``packc::causal_conv1d`` and ``packc::causal_conv1d_bwd``.

The op keeps nothing but its inputs for the backward, which computes the pre-activation again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from packc.ops import documents, summary
from packc.ops.mixer import Example, Mixer, state_dtype
from packc.ops.registration import declare
from packc.ops.shapes import FLOATING
from packc.ops.summary import Late, Summary, add


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


# A segment shifts the inputs that came before it out of the state, and its own in: how many it has is the transition.


def _summary(kernels: Any, x: Tensor, weight: Tensor, begin: Tensor) -> tuple[Tensor, Tensor]:
    L, D = x.shape[1:]
    size = weight.shape[1] - 1
    dtype = state_dtype(x, weight)
    if summary.on_host(begin):
        held = min(L - int(begin), size)
        state = x.new_empty((1, D, size), dtype=dtype)
        state[..., : size - held] = 0
        state[..., size - held :] = x[:, L - held :].mT
        return x.new_full((1,), held, dtype=dtype), state
    last = min(L, size)
    state = x.new_zeros((1, D, size), dtype=dtype)
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


# A state is seen by the first W - 1 tokens alone, which are computed once more where one comes late.


def _enter(
    kernels: Any,
    results: tuple[Tensor, ...],
    entering: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    end: Tensor,
    document: Tensor,
) -> None:
    out, final_state = results
    seeing = min(x.shape[1], weight.shape[1] - 1)
    if summary.on_host(end):
        length = int(end)
        seeing = min(length, seeing)
        if not seeing:
            return
        wanted = final_state.shape[0] > 0 and length == seeing  # else it has been shifted out
        first = x[:, :seeing], weight, bias, activation
        out[:, :seeing], left = kernels.forward(*first, None, entering, wanted)
        if wanted:
            final_state[int(document)] = left[0]
        return
    inside = torch.arange(seeing, device=x.device) < end
    offsets, states = _first_tokens(entering, end, seeing)
    # What is not this document's has no say in what is kept of it.
    seen, (left, _) = kernels.forward(x[:, :seeing], weight, bias, activation, offsets, states, True)
    out[:, :seeing] = torch.where(inside[:, None], seen, out[:, :seeing])
    if final_state.shape[0]:
        short = (end > 0) & (end <= seeing)  # else it has been shifted out
        kept = final_state.index_select(0, document)
        final_state.index_copy_(0, document, torch.where(short.view(1, 1, 1), left, kept))


def _adjoint(
    kernels: Any,
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    entering: Tensor,
    end: Tensor,
) -> Tensor:
    seeing = min(x.shape[1], weight.shape[1] - 1)
    if summary.on_host(end):
        seeing = min(int(end), seeing)
        if not seeing:
            return torch.zeros_like(entering)
        first = dout[:, :seeing], None, x[:, :seeing], weight, bias, activation
        return kernels.backward(*first, None, entering)[-1]
    offsets, states = _first_tokens(entering, end, seeing)
    first = dout[:, :seeing], None, x[:, :seeing], weight, bias, activation
    dstates = kernels.backward(*first, offsets, states)[-1]
    return dstates[:1]


def _first_tokens(entering: Tensor, end: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Offsets and initial states of the document that ends at ``end``, and of what is behind it."""
    offsets = torch.cat([torch.zeros_like(end), end.clamp(max=count), torch.full_like(end, count)])
    return offsets, torch.cat([entering, torch.zeros_like(entering)])


def _leave(_: Any, gradients: tuple[Tensor, ...], leaving: Tensor, __: Tensor, begin: Tensor) -> None:
    (dx,), size = gradients, leaving.shape[-1]
    if summary.on_host(begin):
        held = min(dx.shape[1] - int(begin), size)
        if held:
            dx[:, dx.shape[1] - held :] += leaving[..., size - held :].mT
        return
    last = min(dx.shape[1], size)
    inside = torch.arange(dx.shape[1] - last, dx.shape[1], device=dx.device) >= begin
    dx[:, dx.shape[1] - last :] += torch.where(inside, leaving[..., size - last :], 0).mT


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
        example=Example({"D": 3, "W": 4}),
        flops=_flops,
        # The pre-activation once more, and the gradients of the input and of the taps.
        backward_flops=lambda **sizes: 3 * _flops(**sizes),
        summary=Summary(
            takes=("x", "weight"),
            adjoint_takes=("x", "weight", "bias", "activation", "initial_state"),
            transition="",
            through=_through,
            transposed=_back_through,
            compose=add,
            summary=_summary,
            adjoint=_adjoint,
            flops=lambda **_: 0,
            adjoint_flops=lambda **_: 0,
            late=Late(
                enter_takes=("x", "weight", "bias", "activation"),
                enter=_enter,
                leave_takes=(),
                leave_changes=("x",),
                leave=_leave,
                flops=lambda **_: 0,
                leave_flops=lambda **_: 0,
            ),
        ),
        # Any strides are read in place, and those of the results do not depend on them: Inductor need not copy.
        tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
    )
)
