"""Attention within documents in plain torch: the specification. fp32 arithmetic, fp64 for fp64 inputs.

A document at a time, with every score of it in memory. Heads come first inside: q ``(H, L, K)``, scores ``(H, L, L)``.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from packc.ops import documents
from packc.ops.mixer import state_dtype
from packc.ops.varlen_attention import dropout
from packc.ops.varlen_attention.document_mask import MaskMod
from packc.ops.varlen_attention.scores import Scores, gradient_of_bias, scores, softmax
from packc.ops.varlen_attention.sinks import gradient, of_queries


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    relative_bias: Tensor | None,
    cu_seqlens: Tensor,
    causal: bool,
    scale: float | None,
    window: int | None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    H, wide = q.shape[2], state_dtype(q, sinks, relative_bias)
    outs, logsumexps = [q.new_empty(0, H, v.shape[3])], [q.new_empty(H, 0, dtype=wide)]
    for document, span in _spans(cu_seqlens, q):
        given = _Document(span, H, wide, q, k, v, relative_bias)
        found = given.scores(given.visible(causal, window), scale, softcap).values
        shares = softmax(found, _wide(of_queries(sinks, span), wide))
        p = shares.of_keys * _factors(seed, document, found, dropout_p)
        outs.append(rearrange(p @ given.v, "h t v -> t h v").to(q.dtype))
        logsumexps.append(shares.logsumexp)
    return torch.cat(outs)[None], torch.cat(logsumexps, 1)


def varlen_attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    relative_bias: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    cu_seqlens: Tensor,
    causal: bool,
    scale: float | None,
    window: int | None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    H, H_kv, wide = q.shape[2], k.shape[2], state_dtype(q, sinks, relative_bias)
    dqs, dks, dvs = ([tensor[0, :0]] for tensor in (q, k, v))
    dsinks = [q.new_empty(H, 0, dtype=wide)]
    dbiases = [] if relative_bias is None else [relative_bias[0, :0]]
    for document, span in _spans(cu_seqlens, q):
        given = _Document(span, H, wide, q, k, v, relative_bias)
        wide_dout = _heads(dout, span, H, wide)
        found = given.scores(given.visible(causal, window), scale, softcap)
        # From neither ``logsumexp`` nor ``out``: a derivative would take them for constants, and ``out`` is rounded.
        shares = softmax(found.values, _wide(of_queries(sinks, span), wide))
        p, factors = shares.of_keys, _factors(seed, document, found.values, dropout_p)
        dp = wide_dout @ given.v.mT * factors
        inner = (p * dp).sum(-1, keepdim=True)
        dscores = p * (dp - inner)
        if shares.of_sink is not None:
            dsinks.append(-shares.of_sink * inner[..., 0])
        if given.bias is not None:
            of_bias = gradient_of_bias(dscores, given.bias, given.back)
            dbiases.append(rearrange(of_bias, "h t r -> t h r").to(dbiases[0].dtype))
        dproducts = dscores * found.slope
        dqs.append(rearrange(dproducts @ given.k, "h t k -> t h k").to(q.dtype))
        for grads, of_heads in ((dks, dproducts.mT @ given.q), (dvs, (p * factors).mT @ wide_dout)):
            grads.append(reduce(of_heads, "(g h) t d -> t g d", "sum", g=H_kv).to(q.dtype))
    dq, dk, dv = (torch.cat(grads)[None] for grads in (dqs, dks, dvs))
    of_sinks = None if sinks is None else gradient(torch.cat(dsinks, 1), sinks)
    return dq, dk, dv, of_sinks, torch.cat(dbiases)[None] if dbiases else None


class _Document:
    """Of one document: q, k, v and biases ``(H, L, .)`` in the dtype of the arithmetic."""

    def __init__(
        self, span: slice, H: int, wide: torch.dtype, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
    ) -> None:
        self.q, self.k, self.v = (_heads(tensor, span, H, wide) for tensor in (q, k, v))
        self.bias = None if bias is None else _heads(bias, span, H, wide)
        token = torch.arange(self.q.shape[1], device=q.device)
        self.back = token[:, None] - token

    def visible(self, causal: bool, window: int | None) -> Tensor:
        return _visible(self.q.shape[1], causal, window, self.q.device)

    def scores(self, visible: Tensor, scale: float | None, softcap: float | None = None) -> Scores:
        scale = self.q.shape[-1] ** -0.5 if scale is None else scale
        return scores(self.q, self.k, scale, softcap, self.bias, self.back, visible)


def masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    causal: bool,
    scale: float | None,
    window: int | None,
    mask_mod: MaskMod,
) -> Tensor:
    """The same for what ``mask_mod`` also lets a token see. Differentiable: autograd follows it."""
    from torch.nn.attention.flex_attention import create_mask

    H = q.shape[2]
    parts = [q.new_empty(0, H, v.shape[3])]
    for _, span in _spans(cu_seqlens, q):
        given = _Document(span, H, state_dtype(q), q, k, v, None)
        L = given.q.shape[1]
        allowed = create_mask(_shifted(mask_mod, span.start), 1, H, L, L, device=q.device)[0]
        visible = given.visible(causal, window) & allowed
        sees = visible.any(-1, keepdim=True)
        # A softmax over nothing is NaN, and so would be its second derivative.
        p = given.scores(visible | ~sees, scale).values.softmax(-1).where(sees, 0)
        parts.append(rearrange(p @ given.v, "h t v -> t h v").to(q.dtype))
    return torch.cat(parts)[None]


def _shifted(mask_mod: MaskMod, start: int) -> MaskMod:
    return lambda b, h, q_idx, kv_idx: mask_mod(b, h, q_idx + start, kv_idx + start)


def _spans(cu_seqlens: Tensor, q: Tensor) -> Iterator[tuple[int, slice]]:
    """The documents that are not empty, each with its number."""
    starts = documents.offsets(cu_seqlens, q).tolist()
    return ((n, slice(begin, end)) for n, (begin, end) in enumerate(pairwise(starts)) if begin < end)


def _factors(seed: Tensor | None, document: int, scores: Tensor, dropout_p: float) -> Tensor | float:
    """Of weights: dropout's."""
    if dropout_p == 0:
        return 1.0
    assert seed is not None, "attention drops by a seed"
    return dropout.factors(seed, document, scores.shape[0], scores.shape[1], dropout_p, scores)


def _heads(tensor: Tensor, span: slice, H: int, wide: torch.dtype) -> Tensor:
    """One document of ``(1, T, G, D)``: ``(H, L, D)`` in the dtype of the arithmetic, groups repeated for H heads."""
    return repeat(tensor[0, span].to(wide), "t g d -> (g h) t d", h=H // tensor.shape[2])


def _wide(tensor: Tensor | None, wide: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(wide)


def _visible(L: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """Whether a token (row) of a document sees another (column): bool ``(L, L)``."""
    visible = torch.ones(L, L, dtype=torch.bool, device=device)
    if causal:
        visible = visible.tril()
    elif window is not None:
        visible = visible.tril(window - 1)
    return visible if window is None else visible.triu(1 - window)
