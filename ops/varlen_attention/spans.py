"""``packc::attention_spans`` and its backward: some queries of a packed row, each stretch with a stretch of keys.

Beside ``packc::varlen_attention``, whose documents have their queries and keys at the same places: of a document that
is cut, there are more keys than queries, and what one sequence asks of another lies in two rows. As that op does, it
keeps its inputs, ``out`` and ``logsumexp (H, T)``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from packc.ops import derivatives
from packc.ops.definition import define
from packc.ops.flops import flop_formula
from packc.ops.mixer import state_dtype
from packc.ops.varlen_attention import cpu, spans_cuda, spans_reference
from packc.ops.varlen_attention.op import choose, pairs_before

_arguments = "Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? relative_bias"
_options = "Tensor spans, bool causal, float scale, SymInt? window, float dropout_p, Tensor? seed, float? softcap"
# On CUDA spans are read on the host, which no CUDA graph can hold.
_tags = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout, torch.Tag.cudagraph_unsafe)
_implementations: dict[str, Any] = {"reference": spans_reference, "cpu": cpu, "triton": spans_cuda}


def _forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, relative_bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    """``q (1, T, H, K)``, ``k (1, T_k, G, K)``, ``v (1, T_k, G, V)``, ``relative_bias (1, T, H, R)``.

    ``sinks (H,)`` or ``(1, T, H)``.

    ``spans (S, 5)``, integers: queries from, to, keys from, to, and at which key query 0 is. Stretches rise; empty ones
    may be anywhere. The result, ``(1, T, H, V)``, is zero at queries that are in no span or see no key, and so are
    gradients of keys that nobody sees. ``logsumexp`` is for the backward.

    Raises:
        ValueError: spans do not rise, or end behind T or T_k.
    """
    wide = state_dtype(q, sinks, relative_bias)
    return _implementation(q, wide).attention_spans(q, k, v, _in(wide, sinks), relative_bias, *rest)


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, relative_bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    """Empty for an absent argument."""
    wide = state_dtype(q, sinks, relative_bias)
    found = _implementation(q, wide).attention_spans_bwd(dout, q, k, v, _in(wide, sinks), relative_bias, *rest)
    *of_qkv, dsinks, dbias = found
    return (
        *of_qkv,
        q.new_empty(0) if sinks is None else dsinks.to(sinks.dtype),
        q.new_empty(0) if relative_bias is None else dbias,
    )


def _implementation(q: Tensor, wide: torch.dtype) -> Any:
    return _implementations["reference" if wide is torch.float64 else choose("varlen_attention", q)]


def _in(wide: torch.dtype, x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(wide)


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, relative_bias: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor]:
    wide = state_dtype(q, sinks, relative_bias)
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty((q.shape[2], q.shape[1]), dtype=wide)


def _backward_fake(dout: Tensor, q: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q, *rest[:4]))


def _setup(ctx: Any, args: tuple[Any, ...], found: tuple[Tensor, Tensor]) -> None:
    q, k, v, sinks, bias, spans, *ctx.options, seed, ctx.softcap = args
    ctx.save_for_backward(q, k, v, sinks, bias, *found, spans, seed)
    ctx.mark_non_differentiable(found[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 12
    *tensors, seed = ctx.saved_tensors
    found = torch.ops.packc.attention_spans_bwd.default(dout, *tensors, *ctx.options, seed, ctx.softcap)
    grads = (None if x is None else grad for x, grad in zip(tensors, found))  # noqa: B905  of the first five
    return (*grads, *[None] * 7)


define(f"attention_spans({_arguments}, {_options}) -> (Tensor out, Tensor logsumexp)", _forward, _forward_fake, _tags)
define(
    f"attention_spans_bwd(Tensor dout, {_arguments}, Tensor out, Tensor logsumexp, {_options}) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks, Tensor drelative_bias)",
    _backward,
    _backward_fake,
    _tags,
)
derivatives.register("attention_spans", _forward, _setup, _gradients)
derivatives.register_gradients("attention_spans_bwd", _backward)


# Which queries see which keys is data: as if there were one span of all, and its queries the last of its keys.


def _pairs(T: int, T_k: int, causal: bool, window: int | None) -> int:
    if not causal:
        return T * (T_k if window is None else torch.sym_min(T_k, 2 * window - 1))
    return pairs_before(T_k, window) - pairs_before(T_k - torch.sym_min(T, T_k), window)


@flop_formula(torch.ops.packc.attention_spans)
def _flops(
    q: Any,
    k: Any,
    v: Any,
    sinks: Any,
    relative_bias: Any,
    spans: Any,
    causal: bool,
    scale: float,
    window: int | None,
    *_: Any,
    **__: Any,
) -> int:
    return 2 * q[2] * _pairs(q[1], k[1], causal, window) * (k[3] + v[3])


@flop_formula(torch.ops.packc.attention_spans_bwd)
def _backward_flops(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    sinks: Any,
    relative_bias: Any,
    out: Any,
    logsumexp: Any,
    spans: Any,
    causal: bool,
    scale: float,
    window: Any,
    *_: Any,
    **__: Any,
) -> int:
    return 2 * q[2] * _pairs(q[1], k[1], causal, window) * (3 * k[3] + 2 * v[3])
