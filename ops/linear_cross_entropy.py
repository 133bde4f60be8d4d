"""``packc::linear_cross_entropy``: the loss of every token from its hidden state, never with the logits of all of them.

At a vocabulary of 50k and more the logits ``(T, V)`` are the peak of a training step's memory. Here a chunk of tokens
is multiplied with the head's weight, reduced to a loss and a logsumexp each, and forgotten; the backward makes the
chunk's logits again. That is one product more than if the gradients were made in the forward, and two copies of the
weight's gradient less, of which one would be kept all through the model's backward; a loss scale, any reduction and a
second backward then are as of every other op.

torch's own ``linear_cross_entropy`` (2.13) makes gradients in the forward, and there is none before.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from packc.ops import derivatives, dispatch
from packc.ops.definition import LIBRARY, define
from packc.ops.flops import flop_formula

_HEAD = "Tensor x, Tensor weight, Tensor? bias, Tensor labels"
_LOSS = "int ignore_index, float label_smoothing, float scale, float cap"


class _Loss(NamedTuple):
    """The numbers among the arguments, in order."""

    ignore_index: int
    label_smoothing: float
    scale: float
    cap: float


_TOKENS, _LOGITS = 256, 2**24
"""Least tokens of a chunk, and the logits that one may have in any case."""


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    scale: float = 1.0,
    cap: float = 0.0,
) -> Tensor:
    """``cross_entropy(logits, labels, reduction="none")`` of ``logits = cap * tanh(scale * linear(x) / cap)``.

    Args:
        x: ``(T, D)``.
        weight: ``(V, D)``, in the dtype of ``x``.
        bias: ``(V,)``.
        labels: int64 ``(T,)``.
        cap: zero for ``logits = scale * linear(x)``.

    Returns:
        ``(T,)`` in fp32 (fp64 for fp64 inputs), zero at ignored labels. Logits are rounded to the dtype of ``x``, as
        those of a linear layer are, and all after them is computed in fp32.
    """
    losses, _ = torch.ops.packc.linear_cross_entropy.default(
        x, weight, bias, labels, ignore_index, label_smoothing, scale, cap
    )
    return losses


# ---- kernels ---------------------------------------------------------------------------------------------------------


def _chunks(x: Tensor, weight: Tensor) -> Iterator[slice]:
    """Of tokens, nearly equal ones: as many as make it cheap that each reads and writes the weight's gradient."""
    T, (V, D) = x.shape[0], weight.shape
    most = max(_TOKENS, D // 4, _LOGITS // max(V, 1))
    number = max(1, -(-T // most))
    for n in range(number):
        yield slice(n * T // number, (n + 1) * T // number)


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, how: _Loss) -> Tensor:
    """Of a chunk, a tensor of nobody else's."""
    logits = F.linear(x, weight, bias).to(_wide(x))
    if how.cap:
        return logits.mul_(how.scale / how.cap).tanh_().mul_(how.cap)
    return logits if how.scale == 1 else logits.mul_(how.scale)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _live(labels: Tensor, how: _Loss) -> tuple[Tensor, Tensor]:
    """Which labels count, and all of them as ``(T, 1)`` classes."""
    live = labels != how.ignore_index
    return live, torch.where(live, labels, 0).unsqueeze(1)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *numbers: Any) -> tuple[Tensor, Tensor]:
    how = _Loss(*numbers)
    if dispatch.wanted_kernels() == "reference":
        return _reference(x, weight, bias, labels, how)
    losses = x.new_empty(x.shape[0], dtype=_wide(x))
    logsumexp = torch.empty_like(losses)
    live, classes = _live(labels, how)
    for chunk in _chunks(x, weight):
        logits = _logits(x[chunk], weight, bias, how)
        loss = logits.gather(1, classes[chunk]).squeeze(1).neg_()
        if how.label_smoothing:
            loss = loss.mul_(1 - how.label_smoothing).sub_(logits.mean(1), alpha=how.label_smoothing)
        largest = logits.amax(1, keepdim=True)
        total = logits.sub_(largest).exp_().sum(1).log_().add_(largest.squeeze(1))
        losses[chunk] = loss.add_(total).masked_fill_(~live[chunk], 0)
        logsumexp[chunk] = total
    return losses, logsumexp


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, how: _Loss) -> tuple[Tensor, Tensor]:
    """The same of all tokens at once, by what torch differentiates to any order."""
    logits = F.linear(x, weight, bias).to(_wide(x)) * how.scale
    if how.cap:
        logits = how.cap * torch.tanh(logits / how.cap)
    live, classes = _live(labels, how)
    logsumexp = logits.logsumexp(1)
    loss = -(1 - how.label_smoothing) * logits.gather(1, classes).squeeze(1)
    if how.label_smoothing:
        loss = loss - how.label_smoothing * logits.mean(1)
    return torch.where(live, loss + logsumexp, 0), logsumexp


def _backward(
    grad: Tensor,
    logsumexp: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over tokens are taken in fp32. Empty where a gradient is not wanted."""
    *numbers, wanted = others
    how = _Loss(*numbers)
    if dispatch.wanted_kernels() == "reference":
        return _backward_reference(grad, x, weight, bias, labels, how, wanted)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if wanted[0] else x.new_empty(0)
    grad_weight = weight.new_zeros(weight.shape if wanted[1] else 0, dtype=_wide(x))
    grad_bias = weight.new_zeros(weight.shape[:1] if wanted[2] else 0, dtype=_wide(x))
    live, classes = _live(labels, how)
    grad = torch.where(live, grad, 0).unsqueeze(1)
    for chunk in _chunks(x, weight):
        logits = _logits(x[chunk], weight, bias, how)
        slope = (1 - (logits / how.cap).square_()) if how.cap else None
        of_logits = logits.sub_(logsumexp[chunk].unsqueeze(1)).exp_()
        if how.label_smoothing:
            of_logits.sub_(how.label_smoothing / weight.shape[0])
        of_label = of_logits.new_full((), how.label_smoothing - 1).expand_as(classes[chunk])
        of_logits.scatter_add_(1, classes[chunk], of_label)
        of_logits.mul_(grad[chunk] if how.scale == 1 else grad[chunk] * how.scale)
        if slope is not None:
            of_logits.mul_(slope)
        if wanted[2]:
            grad_bias += of_logits.sum(0)
        of_logits = of_logits.to(x.dtype)
        if wanted[0]:
            torch.mm(of_logits, weight, out=grad_x[chunk])
        if wanted[1] and grad_weight.dtype is x.dtype:
            grad_weight.addmm_(of_logits.T, x[chunk])
        elif wanted[1]:
            grad_weight += of_logits.T @ x[chunk]
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def _backward_reference(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, how: _Loss, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    def losses(*given: Tensor) -> Tensor:
        return _reference(given[0], given[1], given[2] if bias is not None else None, labels, how)[0]

    inputs = (x, weight) if bias is None else (x, weight, bias)
    found = torch.func.vjp(losses, *inputs)[1](grad)
    empty = weight.new_empty(0)
    given = (*found, empty)[:3]
    return tuple(each if is_wanted else empty for each, is_wanted in zip(given, wanted, strict=True))  # type: ignore[return-value]


# ---- registration ----------------------------------------------------------------------------------------------------


def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    losses = x.new_empty((x.shape[0],), dtype=_wide(x))
    return losses, torch.empty_like(losses)


def _backward_fake(
    grad: Tensor, logsumexp: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    wanted = others[-1]
    sizes: tuple[Any, ...] = (x.shape, weight.shape, weight.shape[:1])
    return tuple(  # type: ignore[return-value]
        like.new_empty(size if is_wanted else (0,))
        for like, size, is_wanted in zip((x, weight, weight), sizes, wanted, strict=True)
    )


def _setup(ctx: Any, args: tuple[Any, ...], results: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(results[1], *args[:4])
    ctx.numbers = args[4:]
    ctx.mark_non_differentiable(results[1])


def _pull_back(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:3])
    grads = torch.ops.packc.linear_cross_entropy_bwd.default(grad, *ctx.saved_tensors, *ctx.numbers, wanted)
    return (*(each if is_wanted else None for each, is_wanted in zip(grads, wanted, strict=True)), *[None] * 5)


def _autocast(device: str) -> Any:
    """What autocast does to a linear layer and a cross-entropy."""

    def cast(x: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            given = [
                each if each is None or each.dtype is torch.float64 else each.to(dtype) for each in (x, weight, bias)
            ]
            return torch.ops.packc.linear_cross_entropy.default(*given, *others)

    return cast


define(f"linear_cross_entropy({_HEAD}, {_LOSS}) -> (Tensor losses, Tensor logsumexp)", _forward, _forward_fake)
define(
    f"linear_cross_entropy_bwd(Tensor grad, Tensor logsumexp, {_HEAD}, {_LOSS}, bool[] wanted)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    _backward,
    _backward_fake,
)
derivatives.register("linear_cross_entropy", _forward, _setup, _pull_back)
derivatives.register_gradients("linear_cross_entropy_bwd", _backward)
for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    LIBRARY.impl("linear_cross_entropy", _autocast(_device), _key)


@flop_formula(torch.ops.packc.linear_cross_entropy)
def _forward_flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * x[0] * weight[0] * weight[1]


@flop_formula(torch.ops.packc.linear_cross_entropy_bwd)
def _backward_flops(grad: Any, logsumexp: Any, x: Any, weight: Any, *others: Any, **_: Any) -> int:
    products = 1 + sum(others[-1][:2])
    return 2 * x[0] * weight[0] * weight[1] * products
