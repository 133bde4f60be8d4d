"""LASP's own function, for its users."""

from __future__ import annotations

from torch import Tensor

from packc.distributed.plans import Plan
from packc.ops.linear_attention import linear_attention


def lightning_attn(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, plan: Plan) -> Tensor:
    r"""Lightning attention on this rank's shard, in the call shapes of the ``lasp`` family of functions.

    For every row and head, over the tokens of a document wherever it is cut::

        KV[t]  = exp(-slopes) * KV[t-1] + k[t] v[t]^T
        out[t] = KV[t]^T q[t]

    as in LASP (https://arxiv.org/abs/2404.02882, algorithms 2 and 3) and lightning attention
    (https://arxiv.org/abs/2401.04658); nothing is scaled. Shards of any length, not only of whole blocks; any number of
    documents; nothing to allocate and to clear for the states; the order of ranks is the group's.

    Args:
        q: queries ``(B, H, N, K)``, N this rank's tokens; fp32, bf16, fp16 or fp64. All B rows are cut alike, and have
            the documents of the plan.
        k: keys ``(B, H, N, K)``.
        v: values ``(B, H, N, V)``.
        slopes: ``(H,)``, or ``(H, 1, 1)`` as ``build_slope_tensor`` has them: how fast a head forgets, at least 0.
        plan: of the stream that is cut over ranks.

    Returns:
        ``(B, H, N, V)``, in v's dtype. Gradients reach ``slopes`` as well: each rank's share.

    Raises:
        ValueError: shapes do not fit each other or the plan.
    """
    if q.ndim != 4 or k.shape != q.shape or v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in (("q", q), ("k", k), ("v", v)))
        raise ValueError(f"lightning_attn: q and k must be (B, H, N, K) and v (B, H, N, V), not {shapes}")
    rows, heads, tokens, _ = q.shape
    if slopes.numel() != heads:
        raise ValueError(f"lightning_attn: slopes must be (H,) with H = {heads}, not {tuple(slopes.shape)}")
    if tokens != plan.tokens.shape[0]:
        raise ValueError(f"lightning_attn: q has {tokens} tokens, which are not those of {plan}")
    # Heads do not meet, so rows of one cut may be heads.
    q, k, v = (x.permute(2, 0, 1, 3).flatten(1, 2).unsqueeze(0) for x in (q, k, v))
    out = linear_attention(q, k, v, -slopes.reshape(-1).repeat(rows), 1.0, plan=plan)
    assert isinstance(out, Tensor)
    return out.squeeze(0).unflatten(1, (rows, heads)).permute(1, 2, 0, 3)
