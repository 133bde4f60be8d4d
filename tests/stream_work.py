"""What the tests of shards, losses and faults have each rank do."""

from __future__ import annotations

import dataclasses
import time
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed import distributed_c10d as c10d
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import packc
from packc import distributed

STREAM = [0, 0, 3, 9, 9, 14]
CUTS = {1: [0, 14], 2: [0, 9, 14], 3: [0, 4, 4, 14], 4: [0, 1, 3, 10, 14]}


def plan_of(group: Any, **how: Any) -> Any:
    return distributed.plan(STREAM, group, CUTS[group.size()], **how)


def there_and_back(group: Any, compiled: str | None) -> dict[str, Any]:
    """``unshard(shard(x))``, its gradients, and those of its gradients."""
    plan = plan_of(group)
    torch.manual_seed(2)
    x = torch.randn(1, 14, 2, 3, dtype=torch.float64, requires_grad=True)
    unshard = torch.compile(distributed.unshard, backend=compiled, fullgraph=True) if compiled else distributed.unshard
    mine = distributed.shard(x, plan)
    whole = unshard(mine, plan)
    weights = torch.randn(4, *whole.shape, dtype=torch.float64)[group.rank()]  # of each rank others
    (grad,) = torch.autograd.grad(((whole**2) * weights).sum(), mine, create_graph=not compiled)
    second = None if compiled else torch.autograd.grad(grad.sum(), mine)[0].detach()
    return {"whole": whole.detach(), "weights": weights, "grad": grad.detach(), "second": second, "x": x.detach()}


class LM(nn.Module):
    """Of a convolution, a scan and linear attention."""

    def __init__(self, vocab: int = 11, hidden: int = 6) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(vocab, hidden), nn.Linear(hidden, vocab)
        self.mix, self.taps = nn.Linear(hidden, 5 * hidden), nn.Parameter(torch.randn(hidden, 4) / 2)
        self.A = nn.Parameter(-torch.rand(hidden, 2))

    def forward(self, ids: torch.Tensor, **documents: Any) -> torch.Tensor:
        h = self.tokens(ids)
        h = h + packc.ops.causal_conv1d(h, self.taps, activation="silu", **documents)
        q, k, v, delta, b = self.mix(h).chunk(5, -1)
        h = h + packc.ops.selective_scan(v, delta, self.A, b[..., :2], b[..., 2:4], delta_softplus=True, **documents)
        heads = (x.unflatten(-1, (2, 3)) for x in (q, k, v))
        return self.head(h + packc.ops.linear_attention(*heads, **documents).flatten(2))


def model_and_labels(data: int = 0) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    model = LM().double()
    torch.manual_seed(data)
    ids = torch.randint(11, (1, 14))
    labels = ids.clone()
    labels[0, 5:7] = -100
    return model, ids, labels


def whole_step(data: int = 0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one process, each document's tokens predicting its next ones."""
    model, ids, labels = model_and_labels(data)
    loss = loss_of(model, ids, labels)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def loss_of(model: nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = model(ids, cu_seqlens=torch.tensor(STREAM))
    pairs = [(t, t + 1) for start, end in pairwise(STREAM) for t in range(start, end - 1)]
    before, after = (list(x) for x in zip(*pairs, strict=True))
    return F.cross_entropy(logits[0, before], labels[0, after], ignore_index=-100)


def step(group: Any, through_mesh: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss, and gradients averaged over ranks."""
    model, ids, labels = model_and_labels()
    plan = plan_of(init_device_mesh("cpu", (4,)) if through_mesh else group)
    logits = model(distributed.shard(ids, plan), plan=plan)
    loss = distributed.cross_entropy(logits, distributed.next_tokens(labels, plan), plan)
    loss.backward()
    for p in model.parameters():
        dist.all_reduce(p.grad, group=group)
        p.grad /= group.size()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def step_on_both_axes(group: Any, exchange: str) -> tuple[torch.Tensor, dict[str, torch.Tensor], str]:
    """Of two streams, each on two ranks: gradients averaged over all four; and the name of the ranks' group."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    model, ids, labels = model_and_labels(mesh.get_local_rank("data"))
    plan = distributed.plan(STREAM, mesh["sequence"], [0, 5, 14], exchange=exchange)
    logits = model(distributed.shard(ids, plan), plan=plan)
    loss = distributed.cross_entropy(logits, distributed.next_tokens(labels, plan), plan)
    loss.backward()
    for p in model.parameters():
        dist.all_reduce(p.grad, group=group)
        p.grad /= group.size()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}, plan.group


Trained = tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]


def whole_training(steps: int) -> Trained:
    """Of one process on both streams: the last loss, its gradients, and the parameters after it."""
    model, *_ = model_and_labels()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        losses = []
        for data in range(2):
            _, ids, labels = model_and_labels(data)
            losses.append(loss_of(model, ids, labels))
        loss = torch.stack(losses).mean()
        loss.backward()
        optimizer.step()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return loss.detach(), grads, {name: p.detach() for name, p in model.named_parameters()}


def training_on_both_axes(group: Any, how: str, steps: int) -> Trained:
    """The same on a mesh, each stream on two ranks, by what torch has for the axis of data."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    model, ids, labels = model_and_labels(mesh.get_local_rank("data"))
    if how == "FSDP2":
        from torch.distributed.fsdp import fully_shard  # slow to import, as what follows is

        fully_shard(model, mesh=init_device_mesh("cpu", (4,)))
        run: nn.Module = model
    else:
        run = DistributedDataParallel(model, process_group=group)
    if how == "ZeRO-1":
        from torch.distributed.optim import ZeroRedundancyOptimizer

        optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, process_group=group, lr=0.1)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        plan = distributed.plan(STREAM, mesh["sequence"], [0, 5, 14])
        logits = run(distributed.shard(ids, plan), plan=plan)
        loss = distributed.cross_entropy(logits, distributed.next_tokens(labels, plan), plan)
        loss.backward()
        optimizer.step()
    total = loss.detach().clone()
    dist.all_reduce(total, group=group)
    grads = {name: whole(p.grad).clone() for name, p in model.named_parameters()}
    return total / 4, grads, {name: whole(p).detach().clone() for name, p in model.named_parameters()}


def whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x  # FSDP2's


def mismatches(group: Any) -> dict[str, str]:
    """What is said where ranks differ; on each rank."""
    said = {}

    def note(what: str, call: Any) -> None:
        try:
            call()
        except Exception as error:
            said[what] = f"{type(error).__name__}: {error}"

    rank = group.rank()
    with packc.config.patch(check_plans=True):
        note("cu_seqlens", lambda: distributed.plan([0, 14 + (rank == 1)], group))
        note("cuts", lambda: distributed.plan([0, 14], group, [0, 5 + rank % 2, 9, 14]))
        note("refused by one", lambda: distributed.plan([0, 14], group, [0, 14] if rank == 2 else None))
        note("exchange", lambda: distributed.plan([0, 14], group, exchange="ring" if rank else "all_gather"))
        plan = plan_of(group)
        x = torch.randn(1, plan.tokens.shape[0], 2 + (rank == 2))
        note("shapes", lambda: packc.ops.linear_scan(x, x, plan=plan))
        other = dataclasses.replace(plan, stream=(0, 14)) if rank == 1 else plan
        note("plans", lambda: packc.ops.linear_scan(x[..., :2], x[..., :2], plan=other))
        short = x[:, : -1 if rank == 0 else None, :2]
        note("tokens", lambda: packc.ops.linear_scan(short, short, plan=plan))
        note("none", lambda: packc.ops.linear_scan(x[..., :2], x[..., :2], plan=plan))
    return said


def pairs_of_a_bound_group(group: Any) -> tuple[torch.Tensor, torch.device]:
    """What a scan gives by an exchange in pairs, made while the default group is bound to a device; and that device."""
    world: Any = dist.group.WORLD
    fresh = dist.new_group(range(group.size()))
    world.bound_device_id = torch.device("cuda", 0)  # as init_process_group(device_id=...) does
    splits = mock.patch.object(c10d, "_get_split_source", side_effect=AssertionError("a group is split"))
    try:
        with splits:
            plan = plan_of(fresh, exchange="ring")
        bound = world.bound_device_id
    finally:
        world.bound_device_id = None
    ones = torch.ones(1, plan.tokens.shape[0], 1)
    return distributed.unshard(packc.ops.linear_scan(ones, ones, plan=plan), plan), bound


def refusals(group: Any) -> dict[str, str]:
    said = {}
    plan = plan_of(group)
    x = torch.randn(1, 5, 2)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence")) if group.size() == 4 else None
    leaf = torch.randn(1, plan.tokens.shape[0], 2, requires_grad=True)

    def second_derivative() -> None:
        (grad,) = torch.autograd.grad(packc.ops.linear_scan(leaf, leaf, plan=plan).sum(), leaf, create_graph=True)
        grad.sum().backward()

    def of_attention() -> None:
        x = leaf.unsqueeze(2)
        (grad,) = torch.autograd.grad(packc.ops.varlen_attention(x, x, x, plan=plan).sum(), leaf, create_graph=True)
        grad.sum().backward()

    def forward_mode() -> None:
        torch.func.jvp(lambda x: packc.ops.linear_scan(x, x, plan=plan), (leaf.detach(),), (leaf.detach(),))

    calls = {
        "second derivative": second_derivative,
        "of attention": of_attention,
        "forward mode": forward_mode,
        "no group": lambda: distributed.plan([0, 3], None),
        "not a group": lambda: distributed.plan([0, 3], "sequence"),
        "two dimensions": lambda: distributed.plan([0, 3], mesh),
        "falling": lambda: distributed.plan([0, 3, 2], group),
        "no document": lambda: distributed.plan([0], group),
        "fractions": lambda: distributed.plan([0, 2.5], group),
        "cuts": lambda: distributed.plan([0, 3], group, [0, 1, 3]),
        "exchange": lambda: distributed.plan([0, 3], group, exchange="tree"),
        "far": lambda: distributed.plan([0, 9], group, exchange="neighbour"),
        "both": lambda: packc.ops.linear_scan(x, x, plan=plan, cu_seqlens=torch.tensor([0, 5])),
        "tokens": lambda: packc.ops.linear_scan(x, x, plan=plan),
        "whole": lambda: distributed.shard(x, plan),
    }
    for what, call in calls.items():
        try:
            call()
        except Exception as error:
            said[what] = f"{type(error).__name__}: {error}"
    return said


def lightning(group: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """LASP's function of two rows on shards, against every pair of tokens, written out."""
    plan = plan_of(group)
    torch.manual_seed(5)
    q, k, v, dout = (torch.randn(2, 3, 14, d, dtype=torch.float64) for d in (4, 4, 5, 5))
    slopes = torch.rand(3, 1, 1, dtype=torch.float64, requires_grad=True)
    places = torch.arange(14)
    owner = torch.tensor([n for n, (a, b) in enumerate(pairwise(STREAM)) for _ in range(a, b)])
    seen = (owner[:, None] == owner) & (places[:, None] >= places)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    weights = torch.where(seen, (-slopes * (places[:, None] - places).clamp(min=0)).exp(), 0)
    want = ((q @ k.mT) * weights) @ v
    grads = torch.autograd.grad(want, [*leaves, slopes], dout)
    shard = slice(*plan.cuts[group.rank() : group.rank() + 2])
    mine = [x[:, :, shard].detach().requires_grad_() for x in leaves]
    got = distributed.lightning_attn(*mine, slopes, plan)
    *found, dslopes = torch.autograd.grad(got, [*mine, slopes], dout[:, :, shard])
    dist.all_reduce(dslopes, group=group)
    wanted = [want.detach()[:, :, shard], *(grad[:, :, shard] for grad in grads[:3]), grads[3]]
    return [got.detach(), *found, dslopes], wanted


def lightning_refusals(group: Any) -> list[str]:
    plan, said = plan_of(group), []
    x = torch.randn(2, 3, plan.tokens.shape[0], 4)
    calls = [(x, x[:, :2], x, torch.rand(3)), (x, x, x, torch.rand(2)), (*3 * [torch.randn(1, 3, 5, 4)], torch.rand(3))]
    for call in calls:
        try:
            distributed.lightning_attn(*call, plan)
        except ValueError as error:
            said.append(str(error))
    return said


def dies(rank: int) -> str:
    plan = packc.distributed.plan([0, 8], dist.group.WORLD, exchange="all_gather")
    x = torch.randn(1, 4, 2)
    packc.ops.linear_scan(x, x, plan=plan)
    if rank == 1:
        return ""
    started = time.monotonic()
    try:
        packc.ops.linear_scan(x, x, plan=plan)
    except RuntimeError as error:
        return f"{error} after {time.monotonic() - started:.1f} s"
    return "no error"
