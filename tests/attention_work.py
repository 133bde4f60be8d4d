"""What the tests of sharded attention have each rank do."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from sharded_work import Cut
from torch import Tensor

import packc
from packc import distributed


def inputs_of(cut: Cut, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(4)
    shapes = (1, cut.tokens, 4, 3), (1, cut.tokens, 2, 3), (1, cut.tokens, 2, 5), (1, cut.tokens, 4, 5)
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def results(inputs: list[Tensor], part: slice, function: Any, **how: Any) -> list[Tensor]:
    q, k, v, dout = (x[:, part].detach().clone().requires_grad_() for x in inputs)
    out = function(q, k, v, **how)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


def worst_error_of_scores(group: Any, cuts: list[Cut], dtype: torch.dtype) -> float:
    """With capped scores, biases and sinks; of the gradient of those of heads each rank has its share."""
    worst = 0.0
    for cut in cuts:
        (*qkv, dout), shard = inputs_of(cut, dtype), cut.shard(group.rank())
        of_heads = cut is not cuts[0]
        sinks_of = (4,) if of_heads else (1, cut.tokens, 4)
        own = [torch.randn(sinks_of, dtype=dtype), torch.randn(1, cut.tokens, 4, 3, dtype=dtype)]
        plan = distributed.plan(cut.cu_seqlens, group, cut.cuts)
        for causal in (True, False):
            found = []
            for part, documents in (
                (slice(None), {"cu_seqlens": torch.tensor(cut.cu_seqlens)}),
                (shard, {"plan": plan}),
            ):
                leaves = [x[:, part] if x.ndim > 1 else x for x in (*qkv, *own)]
                q, k, v, sinks, bias = leaves = [x.detach().clone().requires_grad_() for x in leaves]
                more = {"sinks": sinks, "relative_bias": bias, "softcap": 1.5, "causal": causal}
                out = packc.ops.varlen_attention(q, k, v, **more, **documents)
                found.append([out.detach(), *torch.autograd.grad(out, leaves, dout[:, part])])
            whole, mine = found
            if of_heads:
                dist.all_reduce(mine[4], group=group)
            for a, b in zip(mine, whole, strict=True):
                if a.numel():
                    here = b if b.ndim == 1 else b[:, shard]
                    worst = max(worst, float((a - here).abs().max() / b.abs().max()))
    return worst


def worst_error(group: Any, cuts: list[Cut], dtype: torch.dtype, compiled: str | None = None) -> float:
    """Of results and gradients, relative to the largest, or to 1: with a window of 1 there are no gradients."""
    worst = 0.0
    function = packc.ops.varlen_attention
    if compiled:
        function = torch.compile(function, backend=compiled, fullgraph=True, dynamic=True)
    for cut in cuts:
        inputs, shard = inputs_of(cut, dtype), cut.shard(group.rank())
        plan = distributed.plan(cut.cu_seqlens, group, cut.cuts)
        for causal in (True, False):
            plan.reach(causal)
            for window in (None, 1, 4):
                how = {"causal": causal, "window": window, "scale": 0.7 if window else None}
                whole = torch.tensor(cut.cu_seqlens)
                want = results(inputs, slice(None), packc.ops.varlen_attention, cu_seqlens=whole, **how)
                mine = results(inputs, shard, function, plan=plan, **how)
                for a, b in zip(mine, want, strict=True):
                    assert a.dtype == b.dtype
                    if a.numel():
                        worst = max(worst, float((a - b[:, shard]).abs().max() / b.abs().max().clamp(min=1)))
    return worst


def leaks(group: Any) -> list[str]:
    """What NaNs in one document change in others."""
    found = []
    for cut in (Cut([0, 5, 12, 13, 19], [0, 6, 12, 19]), Cut([0, 1, 7, 12, 19], [0, 6, 13, 19])):
        inputs, shard = inputs_of(cut, torch.float32), cut.shard(group.rank())
        tokens = torch.arange(cut.tokens)[shard]
        plan = distributed.plan(cut.cu_seqlens, group, cut.cuts)
        for causal in (True, False):
            before = results(inputs, shard, packc.ops.varlen_attention, plan=plan, causal=causal)
            for n, (start, end) in enumerate(zip(cut.cu_seqlens, cut.cu_seqlens[1:], strict=False)):
                elsewhere = (tokens < start) | (tokens >= end)
                changed = [x.clone() for x in inputs]
                for x in changed:
                    x[:, start:end] = float("nan")
                after = results(changed, shard, packc.ops.varlen_attention, plan=plan, causal=causal)
                for name, a, b in zip(("out", "dq", "dk", "dv"), after, before, strict=True):
                    if not torch.equal(a[:, elsewhere], b[:, elsewhere]):
                        found.append(f"{name} of {cut} by document {n}, causal {causal}")
    return found


def received(group: Any, cut: Cut, causal: bool) -> int:
    """Tokens of other ranks that come."""
    reach = distributed.plan(cut.cu_seqlens, group, cut.cuts).reach(causal)
    sent = [torch.zeros(1, dtype=torch.int64) for _ in range(group.size())]
    mine = torch.tensor([x.shape[0] - 2 for x in reach.receives])
    gathered = [torch.empty_like(mine) for _ in sent]
    dist.all_gather(gathered, torch.tensor([x.shape[0] - 2 for x in reach.sends]), group=group)
    assert [int(of_rank[group.rank()]) for of_rank in gathered] == mine.tolist()
    return int(mine.sum())
