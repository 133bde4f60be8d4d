"""Softmax attention within documents: causal or not, over a window or not, with grouped heads."""

import torch
from torch import Tensor

from packc.ops import documents
from packc.ops.varlen_attention import op as op
from packc.ops.varlen_attention.document_mask import MaskMod
from packc.ops.varlen_attention.with_mask_mod import with_mask_mod

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    mask_mod: MaskMod | None = None,
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
    if q.ndim != 4 or q.dtype not in _DTYPES:
        raise _refused(q, ValueError if q.dtype in _DTYPES else TypeError, "q must be (1, T, H, K) and floating")
    if cu_seqlens is None:
        raise TypeError("varlen_attention: cu_seqlens must be a tensor; for one document it is [0, T]")
    documents.check_cu_seqlens(cu_seqlens, q, "q")
    _, T, H, K = q.shape
    if H < 1 or K < 1:
        raise _refused(q, ValueError, "q must have H >= 1 and K >= 1")
    if k.ndim != 4 or any(documents.differ(k.shape[i], q.shape[i]) for i in (0, 1, 3)) or k.shape[2] < 1:
        raise _refused(k, ValueError, f"k must be (1, T, H_kv, K) = (1, {T}, H_kv, {K})")
    H_kv = k.shape[2]
    if H % H_kv:
        raise _refused(k, ValueError, f"q's {H} heads must be a multiple of k's H_kv")
    if v.ndim != 4 or any(documents.differ(v.shape[i], k.shape[i]) for i in (0, 1, 2)) or v.shape[3] < 1:
        raise _refused(v, ValueError, f"v must be (1, T, H_kv, V) = (1, {T}, {H_kv}, V)")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise _refused(tensor, TypeError, f"{name} must be of q's dtype {q.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"varlen_attention: {name} is on {tensor.device}, q on {q.device}")
    if window is not None and window < 1:
        raise ValueError(f"varlen_attention: window must be at least 1; got {window}")
    if mask_mod is not None:
        return with_mask_mod(q, k, v, cu_seqlens, causal, scale, window, mask_mod)
    return torch.ops.packc.varlen_attention.default(q, k, v, cu_seqlens, causal, scale, window)[0]


def _refused(tensor: Tensor, error: type[Exception], expected: str) -> Exception:
    return error(f"varlen_attention: {expected}; got {tuple(tensor.shape)} of {tensor.dtype}")
