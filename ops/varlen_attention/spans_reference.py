"""Attention within spans in plain torch: the specification. fp32 arithmetic, fp64 for fp64 inputs.

Blocks of queries meet all keys that some of them see in one product.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from packc.ops.mixer import state_dtype
from packc.ops.varlen_attention import dropout

_BLOCK = 256


def attention_spans(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Tensor,
    causal: bool,
    scale: float,
    window: int | None,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    heads = q.shape[2]
    out = q.new_zeros((1, q.shape[1], heads, v.shape[3]))
    logsumexp = q.new_zeros((heads, q.shape[1]), dtype=state_dtype(q))
    for block in _blocks(spans, q.shape[1], k.shape[1], causal, window):
        wide_k, wide_v = (_heads(x, block.keys, heads) for x in (k, v))
        scores = _scores(_heads(q, block.queries, heads), wide_k, scale, block)
        p = _softmax(scores, block) * block.factors(seed, scores, dropout_p)
        out[0, block.queries] = rearrange(p @ wide_v, "h t v -> t h v").to(q.dtype)
        logsumexp[:, block.queries] = scores.logsumexp(-1)
    return out, logsumexp


def attention_spans_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    spans: Tensor,
    causal: bool,
    scale: float,
    window: int | None,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    heads, groups = q.shape[2], k.shape[2]
    dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
    dk, dv = (x.new_zeros(x.shape, dtype=state_dtype(q)) for x in (k, v))
    for block in _blocks(spans, q.shape[1], k.shape[1], causal, window):
        wide_q, wide_dout = (_heads(x, block.queries, heads) for x in (q, dout))
        wide_k, wide_v = (_heads(x, block.keys, heads) for x in (k, v))
        scores = _scores(wide_q, wide_k, scale, block)
        # From neither ``logsumexp`` nor ``out``: a derivative would take them for constants, and ``out`` is rounded.
        p = _softmax(scores, block)
        factors = block.factors(seed, scores, dropout_p)
        dp = wide_dout @ wide_v.mT * factors
        dscores = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        dq[0, block.queries] = rearrange(dscores @ wide_k, "h t k -> t h k").to(q.dtype)
        dk[0, block.keys] += reduce(dscores.mT @ wide_q, "(g h) t d -> t g d", "sum", g=groups)
        dv[0, block.keys] += reduce((p * factors).mT @ wide_dout, "(g h) t d -> t g d", "sum", g=groups)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


class _Block:
    """Some queries of a span, the keys that some of them see, and which sees which."""

    def __init__(self, span: int, starts: tuple[int, int], queries: slice, keys: slice, visible: Tensor) -> None:
        self.queries, self.keys, self.visible = queries, keys, visible
        self._span, self._starts = span, starts

    def factors(self, seed: Tensor | None, scores: Tensor, dropout_p: float) -> Tensor | float:
        """Of weights: dropout's."""
        if dropout_p == 0:
            return 1.0
        assert seed is not None, "attention drops by a seed"
        of_queries, of_keys = (
            range(x.start - start, x.stop - start)
            for x, start in zip((self.queries, self.keys), self._starts, strict=True)
        )
        return dropout.factors_between(seed, self._span, scores.shape[0], of_queries, of_keys, dropout_p, scores)


def _blocks(spans: Tensor, T_q: int, T_k: int, causal: bool, window: int | None) -> Iterator[_Block]:
    queries_end = keys_end = 0
    for span, (begin, end, first, last, shift) in enumerate(spans.tolist()):
        queries_end, keys_end = _behind(begin, end, queries_end, T_q), _behind(first, last, keys_end, T_k)
        for a in range(begin, end, _BLOCK):
            b = min(a + _BLOCK, end)
            low = first if window is None else max(first, a + shift - window + 1)
            high = min(last, b + shift) if causal else last
            if not causal and window is not None:
                high = min(high, b + shift + window - 1)
            low = min(low, last)
            high = max(low, high)
            ahead = (
                torch.arange(low, high, device=spans.device) - torch.arange(a, b, device=spans.device)[:, None] - shift
            )
            visible = ahead <= 0 if causal else torch.ones_like(ahead, dtype=torch.bool)
            if window is not None:
                visible &= ahead.abs() < window
            yield _Block(span, (begin, first), slice(a, b), slice(low, high), visible)


def _behind(begin: int, end: int, before: int, T: int) -> int:
    """Stretches rise, but empty ones."""
    if begin != end and not before <= begin < end <= T:
        raise ValueError(f"spans must rise, one behind the other, up to {T}; got {begin} to {end} behind {before}")
    return max(before, end) if begin < end else before


def _scores(q: Tensor, k: Tensor, scale: float, block: _Block) -> Tensor:
    return (q @ k.mT * scale).masked_fill(~block.visible, -torch.inf)


def _softmax(scores: Tensor, block: _Block) -> Tensor:
    """0 of a query that sees no key: a softmax over nothing is NaN, and so would be its second derivative."""
    sees = block.visible.any(-1, keepdim=True)
    return scores.masked_fill(~sees, 0).softmax(-1).where(sees, 0)


def _heads(x: Tensor, tokens: slice, heads: int) -> Tensor:
    """``(H, t, ...)`` in the dtype of the arithmetic, groups repeated."""
    return repeat(x[0, tokens].to(state_dtype(x)), "t g d -> (g h) t d", h=heads // x.shape[2])
