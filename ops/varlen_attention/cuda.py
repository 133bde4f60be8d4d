"""On CUDA: torch's flash attention for what it takes (bf16, fp16; heads of up to 256), FlexAttention for the rest.

Flash attention caps no scores. Neither drops weights by a seed that it is given, nor adds biases whose gradient is
wanted at a place of its own for each query and distance: with those the reference runs.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from packc.ops.varlen_attention import document_mask, reference, sinks
from packc.ops.varlen_attention.layout import positive, readable
from packc.private_torch import private_torch

# What torch.nn.attention.varlen calls: private, but only they hand out the logsumexp as an op of ours must keep it.
# The arguments passed here are named alike since 2.7. tests/ops/test_varlen_attention_torch.py
# says when they move.
with private_torch():
    _flash = torch.ops.aten._flash_attention_forward.default
    _flash_bwd = torch.ops.aten._flash_attention_backward.default

_LARGEST_HEAD = 256


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    relative_bias: Tensor | None,
    cu_seqlens: Tensor,
    causal: bool,
    scale: float | None,
    window: int | None,
    dropout_p: float,
    seed: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    (_, T, H, _), V = q.shape, v.shape[3]
    if T == 0:
        return q.new_empty(1, 0, H, V), q.new_empty(H, 0, dtype=torch.float32)
    if dropout_p or relative_bias is not None:
        more = sink, relative_bias, cu_seqlens, causal, scale, window, dropout_p, seed, softcap
        return reference.varlen_attention(q, k, v, *more)
    if softcap is not None or not takes_flash(q, v):
        from packc.ops.varlen_attention import flex

        return flex.varlen_attention(q, k, v, sink, cu_seqlens, causal, scale, window, softcap)
    found = flash(q, k, v, _of_documents(cu_seqlens, T), causal, scale, window)
    return found if sink is None else sinks.with_sinks(*found, sink)


def varlen_attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    relative_bias: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    cu_seqlens: Tensor,
    causal: bool,
    scale: float | None,
    window: int | None,
    dropout_p: float,
    seed: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor | None, ...]:
    T = q.shape[1]
    if T == 0:
        return tuple(None if x is None else x.new_zeros(x.shape) for x in (q, k, v, sink, relative_bias))
    if dropout_p or relative_bias is not None:
        more = cu_seqlens, causal, scale, window, dropout_p, seed, softcap
        return reference.varlen_attention_bwd(dout, q, k, v, sink, relative_bias, out, logsumexp, *more)
    if softcap is not None or not takes_flash(q, v):
        from packc.ops.varlen_attention import flex

        found = flex.varlen_attention_bwd(
            dout, q, k, v, sink, out, logsumexp, cu_seqlens, causal, scale, window, softcap
        )
    else:
        found = flash_bwd(dout, q, k, v, out, logsumexp, _of_documents(cu_seqlens, T), causal, scale, window)
    of_sink = None if sink is None else sinks.gradient(sinks.by_token(dout, out, logsumexp, sink), sink)
    return *found, of_sink, None


class Lengths(NamedTuple):
    """As flash attention wants them: of queries and of keys, where documents begin, int32, and the longest one's
    length. The last query of a document is at its last key."""

    queries: Tensor
    keys: Tensor
    longest_queries: int
    longest_keys: int


def _of_documents(cu_seqlens: Tensor, T: int) -> Lengths:
    starts, L = cu_seqlens.int(), document_mask.longest(cu_seqlens, T)
    return Lengths(starts, starts, L, L)


def flash(
    q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, causal: bool, scale: float | None, window: int | None
) -> tuple[Tensor, Tensor]:
    K, V = q.shape[3], v.shape[3]
    q, scale, _ = positive(q, scale)
    q, k, v = readable(q, k, v, size=_head(K, V))
    out, logsumexp, *_ = _flash(
        *(q[0], k[0], v[0], *lengths),
        dropout_p=0.0,
        return_debug_mask=False,
        **_seen(causal, window),
        scale=scale,
    )
    return out[None, ..., :V].contiguous(), logsumexp


def flash_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    lengths: Lengths,
    causal: bool,
    scale: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    K, V = q.shape[3], v.shape[3]
    q, scale, sign = positive(q, scale)
    dout, q, k, v, out = readable(dout, q, k, v, out, size=_head(K, V))
    dq, dk, dv = _flash_bwd(
        *(dout[0], q[0], k[0], v[0], out[0], logsumexp, *lengths),
        dropout_p=0.0,
        rng_state=q.new_zeros(2, dtype=torch.uint64),  # of the dropout that there is not
        unused=q.new_empty(0),
        **_seen(causal, window),
        scale=scale,
    )
    dq = dq if sign == 1 else dq * sign
    return dq[None, ..., :K].contiguous(), dk[None, ..., :K].contiguous(), dv[None, ..., :V].contiguous()


def takes_flash(q: Tensor, v: Tensor) -> bool:
    return (
        q.dtype in (torch.bfloat16, torch.float16)
        and _head(q.shape[3], v.shape[3]) <= _LARGEST_HEAD
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


def _head(K: int, V: int) -> int:
    """The size that q, k and v are brought to: flash attention takes multiples of 8."""
    return -(-max(K, V) // 8) * 8


def _seen(causal: bool, window: int | None) -> dict[str, Any]:
    if window is None:
        return {"is_causal": causal}
    return {"is_causal": False, "window_size_left": window - 1, "window_size_right": 0 if causal else window - 1}
