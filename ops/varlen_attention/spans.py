"""``packc::attention_spans`` and its backward: some queries of a packed row, each stretch with a stretch of keys.

Beside ``packc::varlen_attention``, whose documents have their queries and keys at the same places: of a document that
is cut, there are more keys than queries. Blocks of queries meet all their keys in one product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from packc.ops import derivatives
from packc.ops.flops import flop_formula
from packc.ops.mixer import state_dtype

_BLOCK = 256
_arguments = "Tensor q, Tensor k, Tensor v"
_options = "Tensor spans, bool causal, float scale, SymInt? window"
_lib = torch.library.Library("packc", "FRAGMENT")
_lib.define(f"attention_spans({_arguments}, {_options}) -> Tensor")
_lib.define(f"attention_spans_bwd(Tensor dout, {_arguments}, {_options}) -> (Tensor dq, Tensor dk, Tensor dv)")


def _forward(q: Tensor, k: Tensor, v: Tensor, spans: Tensor, causal: bool, scale: float, window: int | None) -> Tensor:
    """``spans (S, 5)``: queries from, to, keys from, to, and at which key query 0 is; none meets another.

    ``q (1, T, H, K)``, ``k (1, T_k, G, K)``, ``v (1, T_k, G, V)``. The result, ``(1, T, H, V)``, is zero
    at queries in no span.
    """
    heads = q.shape[2]
    out = q.new_zeros((1, q.shape[1], heads, v.shape[3]))
    for queries, keys, visible in _blocks(spans, causal, window):
        wide_q, wide_k, wide_v = _heads(q, queries, heads), _heads(k, keys, heads), _heads(v, keys, heads)
        scores = (wide_q @ wide_k.mT * scale).masked_fill(~visible, -torch.inf)
        out[0, queries] = rearrange(scores.softmax(-1) @ wide_v, "h t v -> t h v").to(q.dtype)
    return out


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Tensor,
    causal: bool,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    heads, groups = q.shape[2], k.shape[2]
    dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
    dk, dv = (x.new_zeros(x.shape, dtype=state_dtype(q)) for x in (k, v))
    for queries, keys, visible in _blocks(spans, causal, window):
        wide_q, wide_k, wide_v = _heads(q, queries, heads), _heads(k, keys, heads), _heads(v, keys, heads)
        wide_dout = _heads(dout, queries, heads)
        p = (wide_q @ wide_k.mT * scale).masked_fill(~visible, -torch.inf).softmax(-1)
        dp = wide_dout @ wide_v.mT
        # From no results of the forward, which a derivative of this would take for constants.
        dscores = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        dq[0, queries] = rearrange(dscores @ wide_k, "h t k -> t h k").to(q.dtype)
        dk[0, keys] += reduce(dscores.mT @ wide_q, "(g h) t d -> t g d", "sum", g=groups)
        dv[0, keys] += reduce(p.mT @ wide_dout, "(g h) t d -> t g d", "sum", g=groups)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _blocks(spans: Tensor, causal: bool, window: int | None) -> Iterator[tuple[slice, slice, Tensor]]:
    """Queries, the keys that some of them see, and which sees which."""
    for begin, end, first, last, shift in spans.tolist():
        for a in range(begin, end, _BLOCK):
            b = min(a + _BLOCK, end)
            low = first if window is None else max(first, a + shift - window + 1)
            high = min(last, b + shift) if causal else last
            if not causal and window is not None:
                high = min(high, b + shift + window - 1)
            ahead = (
                torch.arange(low, high, device=spans.device) - torch.arange(a, b, device=spans.device)[:, None] - shift
            )
            visible = ahead <= 0 if causal else torch.ones_like(ahead, dtype=torch.bool)
            if window is not None:
                visible &= ahead.abs() < window
            yield slice(a, b), slice(low, high), visible


def _heads(x: Tensor, tokens: slice, heads: int) -> Tensor:
    """``(H, t, ...)`` in the dtype of the arithmetic, groups repeated."""
    return repeat(x[0, tokens].to(state_dtype(x)), "t g d -> (g h) t d", h=heads // x.shape[2])


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty((*q.shape[:3], v.shape[3]))


def _backward_fake(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx: Any, args: tuple[Any, ...], out: Tensor) -> None:
    q, k, v, spans, *ctx.options = args
    ctx.save_for_backward(q, k, v, spans)


def _gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return (*torch.ops.packc.attention_spans_bwd.default(dout, *ctx.saved_tensors, *ctx.options), *[None] * 4)


def _register(name: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    _lib.impl(name, kernel, "CPU")
    _lib.impl(name, kernel, "CUDA")
    torch.library.register_fake(f"packc::{name}", fake, lib=_lib)


_register("attention_spans", _forward, _forward_fake)
_register("attention_spans_bwd", _backward, _backward_fake)
derivatives.register(_lib, "attention_spans", _forward, _setup, _gradients)
derivatives.register_gradients(_lib, "attention_spans_bwd", _backward)


# Which queries see which keys is data: as if all saw all.


@flop_formula(torch.ops.packc.attention_spans)
def _flops(q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * q[1] * k[1] * q[2] * (k[3] + v[3])


@flop_formula(torch.ops.packc.attention_spans_bwd)
def _backward_flops(dout: Any, q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * q[1] * k[1] * q[2] * (3 * k[3] + 2 * v[3])
