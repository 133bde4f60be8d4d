"""Softmax attention within documents: causal or not, over a window or not, with grouped heads, dropout, capped scores,
biases by distance, and sinks."""

import torch
from torch import Tensor

from packc.ops.sharded import Plan, offsets_of
from packc.ops.varlen_attention import across as across
from packc.ops.varlen_attention import dropout
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
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    plan: Plan | None = None,
    cu_seqlens_k: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    relative_bias: Tensor | None = None,
) -> Tensor:
    """``out[t, h] = sum_s softmax_s(scale * q[t, h] . k[s, g]) v[s, g]`` over the tokens s that t sees in its document.

    Attention (Vaswani et al., arXiv 1706.03762) over a packed row. Query head h meets key head ``g = h // (H / H_kv)``
    (GQA; Ainslie et al., arXiv 2305.13245).

    Nothing in one document changes a bit in another, NaN and inf included. One exception: where FlexAttention runs
    (on CUDA: fp32, heads larger than 256, a ``softcap``, or a ``mask_mod``), documents may share a tile of 128 tokens.
    Finite numbers stay apart there too; NaN or inf in a tile can reach the other documents in it.

    Args:
        q: ``(1, T, H, K)``, any strides; fp32, bf16, fp16 or fp64. T may be 0.
        k: ``(1, T, H_kv, K)`` of q's dtype; H is a multiple of H_kv. With ``cu_seqlens_k``, ``(1, T_k, H_kv, K)``.
        v: ``(1, T, H_kv, V)`` of q's dtype, of as many tokens as k.
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
        dropout_p: the share of weights that are dropped, at random, at least 0 and at most 1; those that are kept are
            multiplied by ``1 / (1 - dropout_p)``. Not with ``mask_mod``. On CUDA, and for fp64, it runs in plain torch.
        seed: int64 ``()``, on the CPU, from which it follows what is dropped, whichever implementation runs; without
            it, one is drawn from torch's generator.
        cu_seqlens_k: ``(N + 1,)``, int32 or int64, rising from 0 to T_k, of as many documents as ``cu_seqlens``: those
            of k and v, of other lengths than the queries' (cross-attention). Document n of the queries sees document n
            of the keys. The last query of a document is at its last key, which is what ``causal`` and ``window`` go by,
            as with flash attention. A query that sees no key, as of an empty document of keys, gives zero, and all its
            gradients are. Not with ``plan`` or ``mask_mod``. On CUDA flash attention runs it in bf16 and fp16, and
            plain torch the rest.
        softcap: above 0. A score ``s`` becomes ``softcap * tanh(s / softcap)`` (Gemma 2, arXiv 2408.00118).
        sinks: ``(H,)``, or ``(1, T, H)`` if tokens differ in it; floating. Of each head the score of one more key,
            which every token sees and which has no value: it takes its share of the softmax, and nothing is added for
            it (gpt-oss, arXiv 2508.10925).
        relative_bias: ``(1, T, H, R)``, floating. ``relative_bias[0, t, h, d]`` is added to the score of t with the key
            d tokens before it, after the cap; nothing is for keys farther back, or behind. On CUDA, and for fp64, it
            runs in plain torch.

        None of the last three is taken with ``mask_mod``. Where the dtypes of tensors differ, arithmetic is in fp32, or
        in fp64 as soon as one tensor is.

    Returns:
        ``out (1, T, H, V)``, contiguous and of q's dtype. What is kept for the backward is linear in T.

    Raises:
        TypeError, ValueError: an argument's dtype or shape does not fit; the message names both.
    """
    cu_seqlens = offsets_of(plan, cu_seqlens)
    if cu_seqlens is None:
        raise TypeError("varlen_attention: cu_seqlens must be a tensor; for one document it is [0, T]")
    tensors = {"q": q, "k": k, "v": v, "sinks": sinks, "relative_bias": relative_bias}
    if cu_seqlens_k is None:
        op.MIXER.shapes.check(tensors, cu_seqlens)
    elif plan is not None or mask_mod is not None:
        raise ValueError(
            f"varlen_attention: cu_seqlens_k is not taken with {'plan' if plan is not None else 'mask_mod'}"
        )
    else:
        op.check_tensors("varlen_attention", tensors, cu_seqlens, cu_seqlens_k)
    if window is not None and window < 1:
        raise ValueError(f"varlen_attention: window must be at least 1; got {window}")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"varlen_attention: dropout_p must be between 0 and 1; got {dropout_p}")
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1):
        raise ValueError(f"varlen_attention: seed must be one int64 number; got {tuple(seed.shape)} of {seed.dtype}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"varlen_attention: softcap must be above 0; got {softcap}")
    if plan is not None:
        if mask_mod is not None:
            raise ValueError("varlen_attention: mask_mod and plan: masks of positions in a shard mean nothing")
        if dropout_p:
            raise ValueError("varlen_attention: dropout_p is not taken with a plan")
        scale = q.shape[3] ** -0.5 if scale is None else scale
        return plan.attention(q, k, v, sinks, relative_bias, causal, scale, window, softcap)
    if mask_mod is not None:
        others = {"dropout_p": dropout_p or None, "softcap": softcap, "sinks": sinks, "relative_bias": relative_bias}
        for name, given in others.items():
            if given is not None:
                raise ValueError(f"varlen_attention: {name} is not taken with mask_mod")
        return with_mask_mod(q, k, v, cu_seqlens, causal, scale, window, mask_mod)
    if dropout_p and seed is None:
        seed = dropout.draw_seed()
    if cu_seqlens_k is not None:
        which = torch.ops.packc.document_spans.default(cu_seqlens, cu_seqlens_k, q.shape[1], k.shape[1])
        scale = q.shape[3] ** -0.5 if scale is None else scale
        options = causal, scale, window, dropout_p, seed, softcap
        return torch.ops.packc.attention_spans.default(*tensors.values(), which, *options)[0]
    options = causal, scale, window, dropout_p, seed, softcap
    return torch.ops.packc.varlen_attention.default(*tensors.values(), cu_seqlens, *options)[0]
