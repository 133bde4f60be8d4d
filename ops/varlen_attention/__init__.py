"""Softmax attention within documents: causal or not, over a window or not, with grouped heads."""

import torch
from torch import Tensor

from packc.ops.sharded import Plan, offsets_of
from packc.ops.varlen_attention import op as op
from packc.ops.varlen_attention.document_mask import MaskMod
from packc.ops.varlen_attention.with_mask_mod import with_mask_mod


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    mask_mod: MaskMod | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """``out[t, h] = sum_s softmax_s(scale * q[t, h] . k[s, g]) v[s, g]`` over the tokens s that t sees in its document.

    Attention (Vaswani et al., arXiv 1706.03762) over a packed row. Query head h meets key head ``g = h // (H / H_kv)``
    (GQA; Ainslie et al., arXiv 2305.13245).

    Nothing in one document changes a bit in another, NaN and inf included. One exception: where FlexAttention runs
    (on CUDA: fp32, heads larger than 256, or a ``mask_mod``), documents may share a tile of 128 tokens. Finite numbers
    stay apart there too; NaN or inf in a tile can reach the other documents in it.

    Args:
        q: ``(1, T, H, K)``, any strides; fp32, bf16, fp16 or fp64. T may be 0.
        k: ``(1, T, H_kv, K)`` of q's dtype; H is a multiple of H_kv.
        v: ``(1, T, H_kv, V)`` of q's dtype.
        cu_seqlens: ``(N + 1,)``, int32 or int64, rising from 0 to T; documents may be empty.
        plan: in the place of ``cu_seqlens``, of a stream that is cut over ranks: see :class:`packc.ops.sharded.Plan`.
            Keys and values of cut documents are exchanged. Not with ``mask_mod``.
        causal: a token sees no later token.
        scale: of the scores; ``K ** -0.5`` without it.
        window: at least 1. A token sees itself, the ``window - 1`` tokens before it and, without ``causal``, as many
            after it.
        mask_mod: FlexAttention's ``mask_mod(b, h, q_idx, kv_idx) -> bool``, of query heads and of positions *in the
            packed row*; b is 0. A token sees what this, too, lets it see; one that sees nothing becomes 0. On CPU, and
            for fp64, it runs in plain torch: in memory quadratic in the longest document. Under ``torch.compile`` it
            breaks the graph.

    Returns:
        ``out (1, T, H, V)``, contiguous and of q's dtype. What is kept for the backward is linear in T.

    Raises:
        TypeError, ValueError: an argument's dtype or shape does not fit; the message names both.
    """
    cu_seqlens = offsets_of(plan, cu_seqlens)
    if cu_seqlens is None:
        raise TypeError("varlen_attention: cu_seqlens must be a tensor; for one document it is [0, T]")
    op.MIXER.shapes.check({"q": q, "k": k, "v": v}, cu_seqlens)
    if window is not None and window < 1:
        raise ValueError(f"varlen_attention: window must be at least 1; got {window}")
    if plan is not None:
        if mask_mod is not None:
            raise ValueError("varlen_attention: mask_mod and plan: masks of positions in a shard mean nothing")
        return plan.attention(q, k, v, causal, q.shape[3] ** -0.5 if scale is None else scale, window)
    if mask_mod is not None:
        return with_mask_mod(q, k, v, cu_seqlens, causal, scale, window, mask_mod)
    return torch.ops.packc.varlen_attention.default(q, k, v, cu_seqlens, causal, scale, window)[0]
