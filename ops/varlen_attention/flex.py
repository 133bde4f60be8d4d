"""FlexAttention: on CUDA what flash attention cannot do.

Its tiles hold tokens of several documents. What a token does not see has probability zero, so finite numbers of another
document add exactly nothing; but 0 * NaN is NaN, and so is 0 * inf. Starting every document in a tile of its own would
keep these apart too, for a copy of everything in every layer: not done.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, and_masks, flex_attention

from packc.ops import autograd
from packc.ops.varlen_attention import document_mask
from packc.ops.varlen_attention.document_mask import MaskMod
from packc.ops.varlen_attention.layout import readable
from packc.ops.varlen_attention.sinks import with_sinks

_SMALLEST_HEAD = 16  # that its kernel takes


@functools.cache
def compiled() -> Callable[..., Any]:
    """``flex_attention``, which uncompiled would keep T x T scores. Dynamic: one compilation serves all lengths."""
    return torch.compile(flex_attention, dynamic=True)  # here and not above, for it imports all of Inductor


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_seqlens: Tensor,
    causal: bool,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    q, k, v = (tensor.detach() for tensor in (q, k, v))  # no second compilation for those that require gradients
    mask = document_mask.block_mask(cu_seqlens, q.shape[1], causal, window)
    found = _attention(q, k, v, scale, mask, softcap)
    return found if sinks is None else with_sinks(*found, sinks)


def varlen_attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    cu_seqlens: Tensor,
    causal: bool,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of q, k and v: that of the sinks is made of ``out`` and ``logsumexp``."""
    # Flex has no public backward that takes out and logsumexp: its forward runs again, 2 matrix products beside 5.
    mask = document_mask.block_mask(cu_seqlens, q.shape[1], causal, window)
    with autograd.above_autograd(), torch.enable_grad():
        q, k, v = (tensor.detach().requires_grad_() for tensor in (q, k, v))
        again, of_keys = _attention(q, k, v, scale, mask, softcap)
        if sinks is not None:
            again, _ = with_sinks(again, of_keys, sinks.detach())
    dq, dk, dv = (grad.contiguous() for grad in torch.autograd.grad(again, (q, k, v), dout))
    return dq, dk, dv


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
    """The same for what ``mask_mod`` also lets a token see. Differentiable: Flex brings its own backward."""
    T = q.shape[1]
    if T == 0:
        return q.new_empty(1, 0, q.shape[2], v.shape[3])
    # The user's function is not kept: it may hold cu_seqlens, which would then never be forgotten.
    mask = copy.copy(document_mask.block_mask(cu_seqlens, T, causal, window, every_tile=True))
    mask.mask_mod = and_masks(mask.mask_mod, mask_mod)
    return _attention(q, k, v, scale, mask)[0]


def _attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: BlockMask, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    (_, _, H, K), V = q.shape, v.shape[3]
    q, k = readable(q, k, size=max(K, _SMALLEST_HEAD))
    (v,) = readable(v, size=max(V, _SMALLEST_HEAD))
    out, aux = compiled()(
        *(tensor.transpose(1, 2) for tensor in (q, k, v)),
        score_mod=None if softcap is None else _capped(softcap),
        block_mask=mask,
        scale=K**-0.5 if scale is None else scale,
        enable_gqa=k.shape[2] != H,
        return_aux=AuxRequest(lse=True),
    )
    return out.transpose(1, 2)[..., :V].contiguous(), aux.lse[0].contiguous()


@functools.cache
def _capped(softcap: float) -> Callable[..., Tensor]:
    """``score_mod``; one function for a number, for which Flex is compiled."""
    return lambda score, b, h, q_idx, kv_idx: softcap * torch.tanh(score / softcap)
