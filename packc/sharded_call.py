"""A compiled sharded graph, callable on every rank of its group with the padded graph's inputs."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from packc.batches import Packing, pack_batches
from packc.distributed.cuts import equal_work
from packc.distributed.outputs import Cut, note
from packc.distributed.plans import Plan, Rank, plan
from packc.distributed.ranks import check_that_all_agree
from packc.fake_tensors import has_values
from packc.packed_call import NotPacked, PackedCall, keeps_padding
from packc.passes import Graph, ReachInputs, ShardedInputs
from packc.passes.unknown_sizes import unknown_size
from packc.passes.work import Work


class ShardedCall(PackedCall):
    """Packs each batch, and runs the compiled graph on this rank's part of its tokens.

    All ranks are called with the same batch. Before anything is computed they compare it: shapes, mask, documents and
    all numbers that are integers, as ids and labels are; of what is real-valued, masks alone. They compare as well what
    one of them might refuse, so that either all run or all raise.
    """

    def __init__(
        self, *args: Any, group: dist.ProcessGroup, local: Sequence[int] = (), work: Work | None = None, **how: Any
    ) -> None:
        super().__init__(*args, **how)
        self.group = group
        self.local = local
        """Outputs that are of this rank's tokens alone."""
        self.work = work
        """By which ranks have equally much to do; without it, they have equally many tokens."""
        (self.stream,) = self.streams
        self.least = 2 * group.size()
        """Tokens of a batch: two of each rank, as compilers take one for special."""
        self.tokens_here = 0
        """This rank's, of the last batch."""
        self.code = hashlib.sha256(self.graph.code.encode()).hexdigest()

    def __call__(self, *inputs: Any) -> Any:
        mask = inputs[self.stream.mask]
        if not has_values(mask):
            raise NotPacked("packc cannot shard fake tensors: collectives wait for values")
        packing, refusal = None, None
        try:
            with torch.no_grad():
                (rows,) = self._rows(inputs)
                (packing,) = pack_batches([replace(rows, least=self.least)])
            self._check(packing)
        except Exception as error:  # of one rank alone, maybe, for which the others must not wait
            refusal = error
        try:
            self._compare(inputs, packing, refusal)
        except ValueError as differ:
            raise differ from refusal
        if refusal is not None:
            raise refusal
        assert packing is not None
        assert packing.offsets is not None
        for reason in packing.reasons:
            self._say(reason, packing)
        self.last = [packing]
        cuts = None
        if self.work is not None:
            cuts = equal_work(packing.offsets.tolist(), self.group.size(), self.work, least=2)
        of_rank = plan(packing.offsets, self.group, cuts, exchange="all_gather")
        self.tokens_here = of_rank.tokens.shape[0]
        routed = routing(packing, of_rank, int(mask.shape[1]), self.stream.attention)
        outputs = self._run(self.compiled, [*inputs, *routed])
        batch, length = map(int, mask.shape[:2])
        note([outputs[each] for each in self.local], Cut(of_rank, packing.index, (batch, length)))
        return outputs

    def _check(self, packing: Packing) -> None:
        self._compiled([packing])
        if keeps_padding(packing, self.stream):
            raise NotPacked("packc cannot shard a batch of which attention's mask hides some positions that are packed")
        if packing.tokens < self.least:
            raise NotPacked(f"{packing.tokens} tokens over {self.group.size()} ranks: at least {self.least} are needed")

    def _compare(self, inputs: Sequence[Any], packing: Packing | None, refusal: Exception | None) -> None:
        """
        Raises:
            ValueError: ranks differ; on all of them.
        """
        masks = {self.stream.mask, *self.stream.other_masks}
        numbers = [
            x for n, x in enumerate(inputs) if isinstance(x, Tensor) and (n in masks or not x.is_floating_point())
        ]
        numbers += [] if packing is None or packing.offsets is None else [packing.index, packing.offsets]
        given: list[Any] = [tuple(x.shape) for x in inputs if isinstance(x, Tensor)]
        given += [x for x in inputs if isinstance(x, (int, float))]
        device = inputs[self.stream.mask].device
        given += torch.stack([_checksum(x).to(device) for x in numbers]).tolist()
        refused = None if refusal is None else repr(refusal)
        _agree(self.group, repr((self.code, torch.is_grad_enabled(), given, refused)))


def on_all_ranks(group: dist.ProcessGroup, compile_it: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
    """A call and a report that ``compile_it`` made, on all ranks of the same graph.

    Raises:
        ValueError: ranks have other graphs, or one of them refuses; on all of them.
        Exception: what all refuse.
    """
    found, refusal = None, None
    try:
        found = compile_it()
    except Exception as error:  # of one rank alone, maybe, for which the others must not wait
        refusal = error
    call = None if found is None else found[0]
    try:
        _agree(group, repr((call.code if isinstance(call, ShardedCall) else None, refusal)))
    except ValueError as differ:
        raise differ from refusal
    if refusal is not None:
        raise refusal
    assert found is not None
    return found


def _agree(group: dist.ProcessGroup, text: str) -> None:
    check_that_all_agree(group, "sequence parallel: batches or models", text)


def _checksum(x: Tensor) -> Tensor:
    """Of all values and their places, in 64 bits: each times a random number of its place."""
    with torch.no_grad():
        flat = x.detach().reshape(-1)
        if flat.is_floating_point():
            flat = flat.double().view(torch.int64)
        weights = torch.arange(1, flat.numel() + 1, device=x.device)
        for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, -7046029254386353131)):
            weights = (weights ^ (weights >> shift)) * factor  # splitmix64, Steele, Lea and Flood (2014), section 3
        return (flat.to(torch.int64) * (weights | 1)).sum()


def routing(packing: Packing, of_rank: Plan, length: int, attention: Sequence[bool] = ()) -> list[Tensor]:
    """What the graph is told of a batch."""
    low, high = of_rank.cuts[of_rank.rank : of_rank.rank + 2]
    index, device = packing.index, packing.index.device
    anew = torch.ops.packc.counted_anew.default(index, packing.cu_seqlens, length) if packing.several else index
    told = ShardedInputs(
        index=index[low:high].clone(),
        cu_seqlens=of_rank.cu_seqlens,
        by_position=anew[low:high].clone(),
        places=of_rank.places,
        documents=of_rank.documents,
        ranks=of_rank.ranks,
        whole=index,
        shards=of_rank.shards,
        longest=torch.empty(of_rank.longest, 0, device=device),
    )
    reaches = [vars(of_rank.reach(causal)) for causal in attention]
    of_reach = [each for reach in reaches for each in ReachInputs(**reach).flat()]
    return [each.to(device, non_blocking=True) for each in (*told, *of_reach)]


def routing_fakes(packed: Graph) -> list[Tensor]:
    """The same of no batch: how many tokens there are, here and on all ranks, and documents, is unknown."""
    mask, ranks = packed.mask.meta["val"], packed.ranks
    assert ranks is not None
    mode = mask.fake_mode
    shape_env = mode.shape_env
    if shape_env is None:
        shape_env = mode.shape_env = ShapeEnv()

    size = functools.partial(unknown_size, shape_env)
    mine, tokens, longest, documents = size(2), size(2), size(2), size(1)
    torch._check(longest >= mine)
    wide = {"dtype": torch.int64, "device": mask.device}

    def of_reach() -> list[Tensor]:
        numbers = [torch.empty(size(2), 0, device=mask.device) for _ in range(2 * ranks.size + 1)]
        reach = ReachInputs(
            sent=torch.empty(size(0), **wide),
            left=numbers[0],
            spans=torch.empty(2, 5, **wide),
            of_cut=torch.empty(mine, dtype=torch.bool, device=mask.device),
            sends=numbers[1 : ranks.size + 1],
            receives=numbers[ranks.size + 1 :],
        )
        return reach.flat()

    with mode:
        told = ShardedInputs(
            index=torch.empty(mine, **wide),
            cu_seqlens=torch.empty(documents + 1, dtype=torch.int32, device=mask.device),
            by_position=torch.empty(mine, **wide),
            places=torch.empty(5, **wide),
            documents=torch.empty(3, documents, dtype=torch.bool, device=mask.device),
            ranks=torch.empty(len(Rank), ranks.size, dtype=torch.bool, device=mask.device),
            whole=torch.empty(tokens, **wide),
            shards=torch.empty(tokens, **wide),
            longest=torch.empty(longest, 0, device=mask.device),
        )
        return [*told, *(each for _ in packed.requirements.attention for each in of_reach())]
