"""Attention within documents in plain torch: the specification. fp32 arithmetic, fp64 for fp64 inputs.

A document at a time, with every score of it in memory. Heads come first inside: q ``(H, L, K)``, scores ``(H, L, L)``.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from packc.ops import documents
from packc.ops.varlen_attention import dropout
from packc.ops.varlen_attention.document_mask import MaskMod


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    causal: bool,
    scale: float | None,
    window: int | None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    H = q.shape[2]
    outs, logsumexps = [q.new_empty(0, H, v.shape[3])], [q.new_empty(H, 0, dtype=_wide_dtype(q))]
    for document, span in _spans(cu_seqlens, q):
        wide_q, wide_k, wide_v = (_heads(tensor, span, H) for tensor in (q, k, v))
        scores = _scores(wide_q, wide_k, scale, _visible(wide_q.shape[1], causal, window, q.device))
        p = scores.softmax(-1) * _factors(seed, document, scores, dropout_p)
        outs.append(rearrange(p @ wide_v, "h t v -> t h v").to(q.dtype))
        logsumexps.append(scores.logsumexp(-1))
    return torch.cat(outs)[None], torch.cat(logsumexps, 1)


def varlen_attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cu_seqlens: Tensor,
    causal: bool,
    scale: float | None,
    window: int | None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    H, K, H_kv = q.shape[2], q.shape[3], k.shape[2]
    dqs, dks, dvs = ([tensor[0, :0]] for tensor in (q, k, v))
    for document, span in _spans(cu_seqlens, q):
        wide_q, wide_k, wide_v, wide_dout = (_heads(tensor, span, H) for tensor in (q, k, v, dout))
        scores = _scores(wide_q, wide_k, scale, _visible(wide_q.shape[1], causal, window, q.device))
        # From neither ``logsumexp`` nor ``out``: a derivative would take them for constants, and ``out`` is rounded.
        p = scores.softmax(-1)
        factors = _factors(seed, document, scores, dropout_p)
        dp = wide_dout @ wide_v.mT * factors
        dscores = p * (dp - (p * dp).sum(-1, keepdim=True)) * (K**-0.5 if scale is None else scale)
        dqs.append(rearrange(dscores @ wide_k, "h t k -> t h k").to(q.dtype))
        for grads, of_heads in ((dks, dscores.mT @ wide_q), (dvs, (p * factors).mT @ wide_dout)):
            grads.append(reduce(of_heads, "(g h) t d -> t g d", "sum", g=H_kv).to(q.dtype))
    return torch.cat(dqs)[None], torch.cat(dks)[None], torch.cat(dvs)[None]


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
        wide_q, wide_k, wide_v = (_heads(tensor, span, H) for tensor in (q, k, v))
        L = wide_q.shape[1]
        allowed = create_mask(_shifted(mask_mod, span.start), 1, H, L, L, device=q.device)[0]
        visible = _visible(L, causal, window, q.device) & allowed
        sees = visible.any(-1, keepdim=True)
        # A softmax over nothing is NaN, and so would be its second derivative.
        p = _scores(wide_q, wide_k, scale, visible | ~sees).softmax(-1).where(sees, 0)
        parts.append(rearrange(p @ wide_v, "h t v -> t h v").to(q.dtype))
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


def _heads(tensor: Tensor, span: slice, H: int) -> Tensor:
    """One document of ``(1, T, G, D)``: ``(H, L, D)`` in the dtype of the arithmetic, groups repeated for H heads."""
    document = tensor[0, span].to(_wide_dtype(tensor))
    return repeat(document, "t g d -> (g h) t d", h=H // tensor.shape[2])


def _scores(q: Tensor, k: Tensor, scale: float | None, visible: Tensor) -> Tensor:
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    return scores.masked_fill(~visible, -torch.inf)


def _visible(L: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """Whether a token (row) of a document sees another (column): bool ``(L, L)``."""
    visible = torch.ones(L, L, dtype=torch.bool, device=device)
    if causal:
        visible = visible.tril()
    elif window is not None:
        visible = visible.tril(window - 1)
    return visible if window is None else visible.triu(1 - window)


def _wide_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
