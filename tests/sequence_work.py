"""What tests of ``packc.sequence`` have each rank do: in a module that a spawned process can import."""

from __future__ import annotations

import copy
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from harness import PlainLM, batch_of, masks, shaken, tiny_mamba, tiny_mamba2
from rank_work import LMOfBlocks
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import packc.sharded_call
from packc.lazy_logits import LazyLogits
from packc.sharded_call import ShardedCall


class MixersLM(nn.Module):
    """Of packc's mixers, an op between them that looks along the sequence and that packc knows nothing of, and a loss
    of all kinds of sums over tokens."""

    def __init__(self, vocab: int = 32, hidden: int = 6) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(vocab, hidden), nn.Linear(hidden, vocab)
        self.mix, self.taps = nn.Linear(hidden, 5 * hidden), nn.Parameter(torch.randn(hidden, 4) / 2)
        self.A = nn.Parameter(-torch.rand(hidden, 2))
        self.register_buffer("weight", torch.linspace(0.5, 2, vocab))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shown = mask[..., None]
        h = self.tokens(ids) * shown
        h = (h + packc.ops.causal_conv1d(h, self.taps, activation="silu")) * shown
        h = h + h.cumsum(1) / 8
        q, k, v, delta, b = (self.mix(h) * shown).chunk(5, -1)
        h = h + packc.ops.selective_scan(v, delta, self.A, b[..., :2], b[..., 2:4], delta_softplus=True)
        heads = (x.unflatten(-1, (2, 3)) for x in (q, k, v))
        h = (h + packc.ops.linear_attention(*heads).flatten(2)) * shown
        logits = self.head(h)
        flat = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        loss = F.cross_entropy(*flat) + F.cross_entropy(*flat, weight=self.weight, label_smoothing=0.1)
        # A sum that goes back to the tokens, whose gradient comes from all ranks.
        scaled = h / (1 + (h * h).sum())
        spread = (scaled * scaled).sum()
        return loss + spread, logits


class Unmasked(PlainLM):
    """All positions are tokens."""

    def forward(self, ids: torch.Tensor, _: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(ids, torch.ones(ids.shape), labels)


class Embedded(MixersLM):
    """Logits of what was embedded before."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        shown = mask[..., None] > 0
        h = packc.ops.causal_conv1d(torch.where(shown, x, 0), self.taps, activation="silu")
        q, k, v, delta, b = torch.where(shown, self.mix(h), 0).chunk(5, -1)
        h = h + packc.ops.selective_scan(v, delta, self.A, b[..., :2], b[..., 2:4], delta_softplus=True)
        heads = (x.unflatten(-1, (2, 3)) for x in (q, k, v))
        h = h + packc.ops.linear_attention(*heads).flatten(2)
        return self.head(torch.where(shown, h + attention(torch.where(shown, h, 0), mask), 0))


class Attends(PlainLM):
    """Attention to what came before, to a window of it, and to all tokens; positions are learned."""

    def hidden(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        h = super().hidden(ids, mask)
        return h + attention(h, mask)


def attention(h: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    back = torch.arange(h.shape[1])[:, None] - torch.arange(h.shape[1])
    for visible in (back >= 0, (back >= 0) & (back < 3), torch.ones_like(back, dtype=torch.bool)):
        q = h.unflatten(-1, (2, -1)).transpose(1, 2)
        shown = visible & mask.bool()[:, None, None]
        attended = F.scaled_dot_product_attention(q, q.flip(-1), q.roll(1, -1), attn_mask=shown)
        h = h + attended.transpose(1, 2).flatten(2)
    return h


class AttendsToEvery(PlainLM):
    """Attention to every other token: no form that packs."""

    def hidden(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        h = super().hidden(ids, mask).unsqueeze(1)
        back = torch.arange(ids.shape[1])[:, None] - torch.arange(ids.shape[1])
        shown = (back % 2 == 0) & mask.bool()[:, None, None]
        return F.scaled_dot_product_attention(h, h, h, attn_mask=shown).squeeze(1)


class Drops(PlainLM):
    def hidden(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return F.dropout(super().hidden(ids, mask), 0.1)


class Pairs(PlainLM):
    """Two sequences with a mask each, of which the better one is to be the likelier."""

    def forward(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        labels: torch.Tensor,
        other_ids: torch.Tensor,
        other_mask: torch.Tensor,
        other_labels: torch.Tensor,
    ) -> torch.Tensor:
        one, _ = super().forward(ids, mask, labels)
        other, _ = super().forward(other_ids, other_mask, other_labels)
        return one - F.logsigmoid(other - one)


class Normalizes(PlainLM):
    """By the statistics of a batch."""

    def hidden(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(super().hidden(ids, mask).transpose(1, 2), None, None, training=True).transpose(1, 2)


class Transforms(PlainLM):
    """Along the sequence, by an op that packc has no rule for."""

    def hidden(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.fft.fft(super().hidden(ids, mask), dim=1).real


class Doubles(PlainLM):
    def hidden(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return 2 * super().hidden(ids, mask)


class Breaks(PlainLM):
    def forward(self, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        h = self.hidden(ids, mask)
        torch._dynamo.graph_break()
        return self.head(h)


class Pools(Attends):
    """A head for sequences, on the last token of each row."""

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.hidden(ids, mask)
        logits = self.head(h)[torch.arange(len(ids)), mask.sum(1) - 1]
        return F.cross_entropy(logits, labels[:, 0]), logits


class Checkpoints(Attends):
    """All of it is run again in the backward, with its collectives."""

    def hidden(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return checkpoint(super().hidden, ids, mask, use_reentrant=False)


class ReturnsState(PlainLM):
    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) * mask[..., None]
        out, state = packc.ops.causal_conv1d(x, self.taps[0], output_final_state=True)
        return self.head(out), state


def checkpointed() -> nn.Module:
    """Each layer's forward, and its collectives, are run again in the backward."""
    model = tiny_mamba()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def auxiliary() -> nn.Module:
    """Experts, and a loss of how evenly tokens are dealt out to them."""
    model = of_family("mixtral")
    model.config.output_router_logits = True
    model.router_aux_loss_coef = 1.0
    return model


def of_family(name: str) -> nn.Module:
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    import families

    return shaken(families.build(name, 32, 2))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": PlainLM,
    "unmasked": Unmasked,
    "attends": Attends,
    "pools": Pools,
    "checkpoints": Checkpoints,
    "auxiliary": auxiliary,
    "mixers": MixersLM,
    "mamba": tiny_mamba,
    "checkpointed": checkpointed,
    "mamba2": tiny_mamba2,
}


def model_named(name: str) -> nn.Module:
    """One of MODELS, or a tiny model of a family."""
    return MODELS[name]() if name in MODELS else of_family(name)


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
    with torch.no_grad():
        before, after = compiled(x, mask), compiled(spoilt, mask)
    compiled(x, mask)[1].sum().backward()
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
    model = PlainLM(64)
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
