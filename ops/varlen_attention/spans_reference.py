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
from packc.ops.varlen_attention.scores import Scores, Shares, gradient_of_bias, scores, softmax
from packc.ops.varlen_attention.sinks import gradient, of_queries

_BLOCK = 256


def attention_spans(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    relative_bias: Tensor | None,
    spans: Tensor,
    causal: bool,
    scale: float,
    window: int | None,
    dropout_p: float,
    seed: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    heads, wide = q.shape[2], state_dtype(q, sinks, relative_bias)
    out = q.new_zeros((1, q.shape[1], heads, v.shape[3]))
    logsumexp = q.new_zeros((heads, q.shape[1]), dtype=wide)
    for block in _blocks(spans, q.shape[1], k.shape[1], causal, window):
        found = block.scores(q, k, relative_bias, scale, softcap, wide)
        shares = _softmax(found, sinks, block)
        p = shares.of_keys * block.factors(seed, found.values, dropout_p)
        out[0, block.queries] = rearrange(p @ _heads(v, block.keys, heads, wide), "h t v -> t h v").to(q.dtype)
        logsumexp[:, block.queries] = shares.logsumexp
    return out, logsumexp


def attention_spans_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    relative_bias: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    spans: Tensor,
    causal: bool,
    scale: float,
    window: int | None,
    dropout_p: float,
    seed: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    heads, groups, wide = q.shape[2], k.shape[2], state_dtype(q, sinks, relative_bias)
    dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
    dk, dv = (x.new_zeros(x.shape, dtype=wide) for x in (k, v))
    dsinks = q.new_zeros((heads, q.shape[1]), dtype=wide)
    dbias = None if relative_bias is None else relative_bias.new_zeros(relative_bias.shape)
    for block in _blocks(spans, q.shape[1], k.shape[1], causal, window):
        wide_q, wide_dout = (_heads(x, block.queries, heads, wide) for x in (q, dout))
        wide_k, wide_v = (_heads(x, block.keys, heads, wide) for x in (k, v))
        found = block.scores(q, k, relative_bias, scale, softcap, wide)
        # From neither ``logsumexp`` nor ``out``: a derivative would take them for constants, and ``out`` is rounded.
        shares = _softmax(found, sinks, block)
        p, factors = shares.of_keys, block.factors(seed, found.values, dropout_p)
        dp = wide_dout @ wide_v.mT * factors
        inner = (p * dp).sum(-1, keepdim=True)
        dscores = p * (dp - inner)
        if shares.of_sink is not None:
            dsinks[:, block.queries] = -shares.of_sink * inner[..., 0]
        if dbias is not None and relative_bias is not None:
            bias = _heads(relative_bias, block.queries, heads, wide)
            of_bias = gradient_of_bias(dscores, bias, block.back)
            dbias[0, block.queries] = rearrange(of_bias, "h t r -> t h r").to(dbias.dtype)
        dproducts = dscores * found.slope
        dq[0, block.queries] = rearrange(dproducts @ wide_k, "h t k -> t h k").to(q.dtype)
        dk[0, block.keys] += reduce(dproducts.mT @ wide_q, "(g h) t d -> t g d", "sum", g=groups)
        dv[0, block.keys] += reduce((p * factors).mT @ wide_dout, "(g h) t d -> t g d", "sum", g=groups)
    return dq, dk.to(k.dtype), dv.to(v.dtype), None if sinks is None else gradient(dsinks, sinks), dbias


class _Block:
    """Some queries of a span, the keys that some of them see, which sees which, and how far back."""

    def __init__(
        self, span: int, starts: tuple[int, int], queries: slice, keys: slice, visible: Tensor, back: Tensor
    ) -> None:
        self.queries, self.keys, self.visible, self.back = queries, keys, visible, back
        self._span, self._starts = span, starts

    def scores(
        self, q: Tensor, k: Tensor, bias: Tensor | None, scale: float, softcap: float | None, wide: torch.dtype
    ) -> Scores:
        heads = q.shape[2]
        of_queries = None if bias is None else _heads(bias, self.queries, heads, wide)
        q, k = _heads(q, self.queries, heads, wide), _heads(k, self.keys, heads, wide)
        return scores(q, k, scale, softcap, of_queries, self.back, self.visible)

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
            yield _Block(span, (begin, first), slice(a, b), slice(low, high), visible, -ahead)


def _behind(begin: int, end: int, before: int, T: int) -> int:
    """Stretches rise, but empty ones."""
    if begin != end and not before <= begin < end <= T:
        raise ValueError(f"spans must rise, one behind the other, up to {T}; got {begin} to {end} behind {before}")
    return max(before, end) if begin < end else before


def _softmax(found: Scores, sinks: Tensor | None, block: _Block) -> Shares:
    """0 of a query that sees no key: a softmax over nothing is NaN, and so would be its second derivative."""
    values = found.values
    if sinks is not None:
        return softmax(values, of_queries(sinks.to(values.dtype), block.queries))
    sees = block.visible.any(-1, keepdim=True)
    shares = softmax(values.masked_fill(~sees, 0), None)
    return shares._replace(of_keys=shares.of_keys.where(sees, 0), logsumexp=values.logsumexp(-1))


def _heads(x: Tensor, tokens: slice, heads: int, wide: torch.dtype) -> Tensor:
    """``(H, t, ...)`` in the dtype of the arithmetic, groups repeated."""
    return repeat(x[0, tokens].to(wide), "t g d -> (g h) t d", h=heads // x.shape[2])
