"""What tests of ``packc.sequence`` have each rank do: in a module that a spawned process can import."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from harness import PlainLM, batch_of, masks
from models_to_cut import (
    Attends,
    AttendsInChunks,
    AttendsToEvery,
    Breaks,
    Doubles,
    Drops,
    Embedded,
    MixersLM,
    Normalizes,
    Pairs,
    ReturnsState,
    Transforms,
    model_named,
    of_family,
)
from rank_work import LMOfBlocks
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import packc.sharded_call
from packc.lazy_logits import LazyLogits
from packc.sharded_call import ShardedCall


def step(call: Any, model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Loss, logits and gradients of one step."""
    model.zero_grad()
    loss, logits = call(*batch.values()) if isinstance(model, (PlainLM, MixersLM)) else hf(call, batch)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "logits": logits.detach(), **gradients}


def hf(call: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    out = call(**batch)
    return out.loss, out.logits


def sharded(model: Any, group: Any, inner: str = "aot_eager", **options: Any) -> tuple[Any, list[ShardedCall]]:
    """Compiled over the ranks of a group, and the calls that are made of its graphs."""
    calls: list[ShardedCall] = []

    class Noting(ShardedCall):
        def __init__(self, *args: Any, **how: Any) -> None:
            super().__init__(*args, **how)
            calls.append(self)

    packc.sharded_call.ShardedCall = Noting
    how = {"packc.sequence": group, "packc.inner": inner, **{f"packc.{name}": value for name, value in options.items()}}
    return torch.compile(model, backend="packc", options=how), calls


def worst_errors(
    group: Any, name: str, batches: list[list[str]], inner: str = "aot_eager", in_ddp: bool = False
) -> tuple[list[dict[str, float]], int, list[int]]:
    """Of each batch, against eager on the whole of it: the largest error of each result, relative to its largest entry;
    how many graphs were compiled, and how many tokens this rank computed of each batch."""
    torch.manual_seed(3)
    model = model_named(name).train()
    eager = copy.deepcopy(model)
    of_ddp = DistributedDataParallel(model, process_group=group) if in_ddp else model
    compiled, calls = sharded(of_ddp, group, inner)
    found, tokens = [], []
    for rows in batches:
        batch = batch_of(rows)
        want, got = step(eager, eager, batch), step(compiled, model, batch)
        for key, value in got.items():
            if key not in ("loss", "logits") and not in_ddp:
                dist.all_reduce(value, group=group)
                value /= group.size()
        for each in (want, got):
            if each["logits"].ndim == 3:
                each["logits"] *= batch["attention_mask"][..., None]
        assert got.keys() == want.keys()
        found.append({key: _error(got[key], value) for key, value in want.items()})
        tokens.append(calls[-1].tokens_here)
    return found, len(calls), tokens


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max().clamp(min=1e-6)).item()


def leaks(group: Any) -> tuple[bool, bool, bool]:
    """Of three documents, the second one spoilt: whether the others' logits changed by a bit, and its own did not;
    whether gradients of the second one's logits reach the others."""
    torch.manual_seed(3)
    model = Embedded()
    compiled, _ = sharded(model, group)
    mask = masks(["1111111", "1111111", "1110000"])
    x = torch.randn(3, 7, 6, requires_grad=True)
    spoilt = x.detach().clone()
    spoilt[1, 3] = float("nan")
    before, after = compiled(x, mask), compiled(spoilt.requires_grad_(), mask)
    before[1].sum().backward()
    others = x.grad[[0, 2]]
    dist.all_reduce(others, group=group)
    own = bool(after[1, 3:].isnan().all())
    return not torch.equal(before[[0, 2]], after[[0, 2]]), not own, bool(others.any())


def of_its_own_tokens(group: Any) -> tuple[dict[str, float], list[int], str]:
    """With local outputs and parts of equal work, in a block: errors against eager, of a loss that is taken of local
    logits as well; how many tokens each rank has, and what a call outside of the block says."""
    torch.manual_seed(3)
    model = Attends()
    eager = copy.deepcopy(model)
    batch = batch_of(["1" * 40, "1" * 11 + "0" * 29])
    ids, mask, labels = batch.values()
    compiled = torch.compile(model, backend="packc", options={"packc.inner": "aot_eager"})
    with packc.distributed.sequence_parallel(group, outputs="local", cuts="work"):
        loss, logits = compiled(ids, mask, labels)
    cut = packc.distributed.cut_of(logits)
    assert logits.shape == (1, len(cut.plan.tokens), 32)
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    outside = packc.distributed.cross_entropy(logits, cut.local(shifted), cut.plan)
    whole = packc.distributed.unshard(logits)
    (loss + outside + (whole * whole).mean()).backward()
    want_loss, want = eager(ids, mask, labels)
    want = want * mask[..., None]
    (2 * want_loss + (want * want).mean()).backward()
    found = {"loss": _error(loss, want_loss), "outside": _error(outside, want_loss), "logits": _error(whole, want)}
    for (name, mine), theirs in zip(model.named_parameters(), eager.parameters(), strict=True):
        dist.all_reduce(mine.grad, group=group)
        found[name] = _error(mine.grad / group.size(), theirs.grad)
    tokens = [high - low for low, high in itertools.pairwise(cut.plan.cuts)]
    return found, tokens, said(lambda: compiled(ids, mask, labels))


def unread(group: Any, outputs: str) -> tuple[bool, dict[str, float]]:
    """In DDP: whether logits are computed in a step that reads none; and errors against eager, of those that one rank
    alone reads after it, and of gradients of a loss that is taken of logits as well."""
    torch.manual_seed(3)
    model = PlainLM(64, layers=1)
    eager = copy.deepcopy(model)
    in_ddp = DistributedDataParallel(model, process_group=group)
    compiled, _ = sharded(in_ddp, group, sequence_outputs=outputs)
    ids, mask, labels = batch_of(["1111111111", "1111111000"], 64).values()
    want_loss, want = eager(ids, mask, labels)
    want = want * mask[..., None]
    loss, logits = compiled(ids, mask, labels)
    loss.backward()
    untouched = type(logits) is LazyLogits and logits.values_of._values is None
    found = {"loss": _error(loss, want_loss)}
    if group.rank() == 1:
        cut = packc.distributed.cut_of(logits) if outputs == "local" else None
        found["logits"] = _error(logits, want if cut is None else cut.local(want))
    model.zero_grad()
    loss, logits = compiled(ids, mask, labels)
    whole = packc.distributed.unshard(logits) if outputs == "local" else logits
    (loss + (whole * whole).mean()).backward()
    (want_loss + (want * want).mean()).backward()
    pairs = zip(model.named_parameters(), eager.parameters(), strict=True)
    return untouched, found | {name: _error(mine.grad, theirs.grad) for (name, mine), theirs in pairs}


def uses(group: Any) -> dict[str, float]:
    """Errors against eager: of an evaluation without gradients that returns hidden states, and of gradients that two
    backwards add up."""
    torch.manual_seed(3)
    model = of_family("lfm2")
    eager = copy.deepcopy(model)
    compiled, _ = sharded(model, group)
    batch = batch_of(["11111111", "11111000", "11000000"])
    shown = batch["attention_mask"][..., None]
    with torch.no_grad():
        got, want = (each.eval()(**batch, output_hidden_states=True) for each in (compiled, eager))
    found = {"loss": _error(got.loss, want.loss), "logits": _error(got.logits * shown, want.logits * shown)}
    found |= {
        f"hidden {n}": _error(a * shown, b * shown)
        for n, (a, b) in enumerate(zip(got.hidden_states, want.hidden_states, strict=True))
    }
    for each in (compiled, eager):
        each.train()
        for _ in range(2):
            each(**batch).loss.backward()
    for (name, mine), theirs in zip(model.named_parameters(), eager.parameters(), strict=True):
        dist.all_reduce(mine.grad, group=group)
        found[name] = _error(mine.grad / group.size(), theirs.grad)
    return found


def on_two_axes(_: Any, blocks: bool) -> float:
    """Two batches, each cut over two of four ranks, over all of which FSDP2 shards weights. With ``blocks``, each is a
    unit of FSDP2, and a graph."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    return _sharded_weights(mesh["data"], mesh["sequence"], init_device_mesh("cpu", (4,)), blocks)


def on_three_axes(_: Any) -> float:
    """FSDP2 shards weights over the ranks that have batches of their own, and has them as often as each is cut."""
    mesh = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("data", "shard", "sequence"))
    hybrid = DeviceMesh("cpu", mesh.mesh[0].T.contiguous(), mesh_dim_names=("replicate", "shard"))
    return _sharded_weights(mesh["shard"], mesh["sequence"], hybrid, True)


def _sharded_weights(data: DeviceMesh, sequence: DeviceMesh, weights: DeviceMesh, blocks: bool) -> float:
    """The worst error of gradients against those of both batches in one process."""
    torch.manual_seed(3)
    model = LMOfBlocks()
    eager = copy.deepcopy(model)
    batches = [batch_of(rows) for rows in (["1111111", "1110000"], ["1111111", "1111110"])]
    for batch in batches:
        (eager(*batch.values())[0] / 2).backward()
    for each in [*(model.blocks if blocks else ()), model]:
        fully_shard(each, mesh=weights)
    compiled, _ = sharded(model, sequence)
    loss, _ = compiled(*batches[data.get_local_rank()].values())
    loss.backward()
    pairs = zip(model.parameters(), eager.parameters(), strict=True)
    return max(_error(mine.grad.full_tensor(), theirs.grad) for mine, theirs in pairs)


def explained(group: Any, folder: Path) -> tuple[str, list[Any], list[str]]:
    """A report, its waits, and what timelines it saves."""
    report = packc.explain(PlainLM(), options={"packc.sequence": group})(*batch_of(["1111111", "1110000"]).values())
    assert report.communication is not None
    paths = [folder / f"{group.rank()}.{kind}" for kind in ("json", "png")]
    for path in paths:
        report.communication.save(path)
    events = json.loads(paths[0].read_text())["traceEvents"]
    lanes = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert paths[1].read_bytes().startswith(b"\x89PNG")
    return str(report), report.communication.waits, [lanes[event["tid"]] for event in events if event["ph"] == "X"]


def waits_of_a_mamba(group: Any) -> list[Any]:
    """Of one layer that is wide enough to have work, in the order in which they begin."""
    from transformers import MambaConfig, MambaForCausalLM  # slow to import

    model = MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=128, num_hidden_layers=1, use_cache=False))
    how = {"packc.sequence": group, "packc.sequence_outputs": "local", "packc.inner": "aot_eager"}
    report = packc.explain(model, options=how)
    found = report(**batch_of(["1111111", "1110000"])).communication
    assert found is not None
    return found.waits


def documents_in_rows(group: Any) -> float:
    """Against packc on one process: the largest error of logits, which positions counted anew enter, and gradients."""
    torch.manual_seed(3)
    model = Attends()
    alone = copy.deepcopy(model)
    compiled, _ = sharded(model, group)
    packed = torch.compile(alone, backend="packc", options={"packc.inner": "aot_eager", "packc.strict": True})
    batch = batch_of(["1111111111", "1111111000"])
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 2, 2], [0, 0, 1, 1, 1, 1, 2, 2, 2, 2]])
    for row, place in ((0, 3), (0, 8), (1, 2), (1, 6)):
        batch["labels"][row, place] = -100
    with packc.documents(seq_idx=seq_idx):
        want, got = step(packed, alone, batch), step(compiled, model, batch)
    for key, value in got.items():
        if key not in ("loss", "logits"):
            dist.all_reduce(value, group=group)
            value /= group.size()
    return max(_error(got[key], value) for key, value in want.items())


def said(call: Callable[[], Any]) -> str:
    """What an error says."""
    try:
        call()
    except Exception as error:
        first, *rest = str(error).splitlines()
        return rest[0] if isinstance(error, BackendCompilerFailed) else f"{type(error).__name__}: {first}"
    return "no error"


def without_gradients(call: Any, off: bool) -> Any:
    return torch.set_grad_enabled(not off)(lambda *inputs: call(*inputs)) if off else call


def refusals(group: Any) -> dict[str, str]:
    batch = batch_of(["1111111", "1110000"])
    ids, mask, labels = batch.values()
    other = ids if group.rank() != 1 else ids.roll(1, 0)
    plain = sharded(PlainLM(), group)[0]
    is_other = group.rank() == 1
    skipped = "none" if is_other else None
    short = [x[:, : -1 if is_other else None] for x in batch.values()]
    found = {
        "two sequences": said(lambda: sharded(Pairs(), group)[0](*batch.values(), *batch_of(["11111"]).values())),
        "statistics": said(lambda: sharded(Normalizes(), group)[0](*batch.values())),
        "no rule": said(lambda: sharded(Transforms(), group)[0](*batch.values())),
        # Of one rank alone: all say so, and none waits.
        "model": said(lambda: sharded(Doubles() if is_other else PlainLM(), group)[0](*batch.values())),
        "dropout on one": said(lambda: sharded(Drops() if is_other else PlainLM(), group)[0](*batch.values())),
        "shapes": said(lambda: sharded(PlainLM(), group)[0](*short)),
        "failure of one": said(lambda: sharded(PlainLM(), group, skip_passes=skipped)[0](*batch.values())),
        "attention": said(lambda: sharded(AttendsToEvery(), group)[0](*batch.values())),
        "chunks": said(lambda: sharded(AttendsInChunks(), group)[0](*batch.values())),
        "dropout": said(lambda: sharded(Drops(), group)[0](*batch.values())),
        "states": said(lambda: sharded(ReturnsState(), group)[0](ids, mask)),
        "few tokens": said(lambda: plain(ids[:1, :5], mask[:1, :5], labels[:1, :5])),
        "batches": said(lambda: plain(other, mask, labels)),
        "gradients": said(lambda: without_gradients(plain, is_other)(*batch.values())),
        "masks": said(lambda: plain(ids, mask if group.rank() != 1 else torch.ones_like(mask), ids)),
        "option": said(lambda: sharded(PlainLM(), "sequence")[0](*batch.values())),
        "outputs": said(lambda: sharded(PlainLM(), group, sequence_outputs="none")[0](*batch.values())),
        "graph break": said(lambda: sharded(Breaks(), group, sequence_outputs="local")[0](*batch.values())),
        "another option": said(lambda: sharded(PlainLM(), group, sequence_length=3)[0](*batch.values())),
    }
    # Ranks that have refused go on together.
    return found | {"next": said(lambda: plain(*batch.values()))}
