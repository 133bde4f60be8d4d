"""``packc::varlen_attention_sharded``: attention on one rank's shard, with the keys of documents that reach into it.

LASP-2H (https://arxiv.org/abs/2502.07563, section 3.5) gathers all keys and values; here a rank gets those of its own
documents and no others, each from the rank that has them, and returns their gradients the same way. Documents that are
not cut, all but two at most, meet in the plain op while these are on their way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from packc.distributed.first_order import first_order
from packc.distributed.reach import count
from packc.ops.varlen_attention import spans as spans

_library = torch.library.Library("packc", "FRAGMENT")
_library.define(
    "varlen_attention_sharded(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? relative_bias, Tensor cu_seqlens, "
    "bool causal, float? scale, SymInt? window, float? softcap, Tensor sent, Tensor[] sends, Tensor[] receives, "
    "Tensor left, Tensor spans, Tensor of_cut, str group) -> Tensor"
)
_packc, _collectives = torch.ops.packc, torch.ops._c10d_functional


def _composite(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    relative_bias: Tensor | None,
    cu_seqlens: Tensor,
    causal: bool,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    sent: Tensor,
    sends: Sequence[Tensor],
    receives: Sequence[Tensor],
    left: Tensor,
    *rest: Any,
) -> Tensor:
    scale = q.shape[3] ** -0.5 if scale is None else scale
    sizes = [count(x) for x in sends], [count(x) for x in receives], count(left)
    options = causal, scale, window, *_NO_DROPOUT, softcap
    return _Attention.apply(q, k, v, sinks, relative_bias, cu_seqlens, options, sent, sizes, *rest)


_library.impl("varlen_attention_sharded", _composite, "CompositeImplicitAutograd")

_NO_DROPOUT = (0.0, None)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        relative_bias: Tensor | None,
        cu_seqlens: Tensor,
        options: tuple[Any, ...],
        sent: Tensor,
        sizes: tuple[list[int], list[int], int],
        spans: Tensor,
        of_cut: Tensor,
        group: str,
    ) -> Tensor:
        sends, receives, left = sizes
        both = torch.cat([k.flatten(2), v.flatten(2)], 2).squeeze(0)
        coming = _exchange(both.index_select(0, sent), sends, receives, group)
        more = sinks, relative_bias
        out, logsumexp = _packc.varlen_attention.default(q, k, v, *more, cu_seqlens, *options)
        came = _collectives.wait_tensor.default(coming)
        reached = torch.cat([came[:left], both, came[left:]]).unsqueeze(0)
        reached_k, reached_v = _parted(reached, k, v)
        of_spans, logsumexp_of_spans = _packc.attention_spans.default(q, reached_k, reached_v, *more, spans, *options)
        out = torch.where(of_cut[:, None, None], of_spans, out)
        logsumexp = torch.where(of_cut, logsumexp_of_spans, logsumexp)
        kept = out, logsumexp, reached_k, reached_v, cu_seqlens, sent, spans, of_cut
        ctx.save_for_backward(q, k, v, *more, *kept)
        ctx.options, ctx.sizes, ctx.group = options, sizes, group
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        q, k, v, sinks, bias, out, logsumexp, *reached, cu_seqlens, sent, spans, of_cut = ctx.saved_tensors
        (sends, receives, left), is_cut = ctx.sizes, of_cut[:, None, None]
        dq_cut, dk_reached, dv_reached, dsinks_cut, dbias_cut = _packc.attention_spans_bwd.default(
            dout, q, *reached, sinks, bias, out, logsumexp, spans, *ctx.options
        )
        found = torch.cat([dk_reached.flatten(2), dv_reached.flatten(2)], 2).squeeze(0)
        tokens = q.shape[1]
        returning = _exchange(torch.cat([found[:left], found[left + tokens :]]), receives, sends, ctx.group)
        dq, dk, dv, dsinks, dbias = _packc.varlen_attention_bwd.default(
            torch.where(is_cut, 0, dout), q, k, v, sinks, bias, out, logsumexp, cu_seqlens, *ctx.options
        )
        returned = _collectives.wait_tensor.default(returning)
        mine = found[left : left + tokens].index_add(0, sent, returned)
        dk_cut, dv_cut = _parted(mine.unsqueeze(0), k, v)
        # Of sinks of heads this rank's share, as of any weight; of a token's, one of the two is zero.
        return (
            torch.where(is_cut, dq_cut, dq),
            dk + dk_cut,
            dv + dv_cut,
            None if sinks is None else dsinks + dsinks_cut,
            None if bias is None else torch.where(is_cut, dbias_cut, dbias),
            *[None] * 7,
        )


def _exchange(x: Tensor, sends: list[int], receives: list[int], group: str) -> Tensor:
    """Rows of ``x`` go to the ranks in their order: begun, and to be waited for."""
    return _collectives.all_to_all_single.default(x.contiguous(), receives, sends, group)


def _parted(both: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    of_k, of_v = both.split([k.shape[2] * k.shape[3], v.shape[2] * v.shape[3]], 2)
    return of_k.unflatten(2, k.shape[2:]), of_v.unflatten(2, v.shape[2:])
