"""The sharded form ``(1, T_r, ...)``: the packed one, cut over the ranks of a group, of which this one has a part.

Every rank gets the same padded batch and gathers its own tokens. Values that have no token axes are the same on all
ranks, and so is what is computed padded; gradients are W times a rank's share, so that their mean over ranks is the
gradient of the whole batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx
from torch._ops import OpOverload

from packc.passes.arguments import arguments_of
from packc.passes.forms.form import Write
from packc.passes.forms.packed import Packed
from packc.passes.graph import Graph, Ranks
from packc.passes.module_names import module_path
from packc.passes.outlined import is_random, ops_of
from packc.passes.reading import Call, InChunks
from packc.passes.reasons import NotPackable


class Inputs(NamedTuple):
    """What the graph is told of a batch, in this order; ``packc.distributed.Plan`` explains the names that it has. What
    attention wants (``reach_inputs``) follows."""

    index: Any
    """int64 (T_r,): where this rank's tokens are in the padded batch."""
    cu_seqlens: Any
    by_position: Any
    """int64 (T_r,): the index, as it would be if every document in a row were its first."""
    places: Any
    documents: Any
    ranks: Any
    whole: Any
    """int64 (T,): where all tokens are in the padded batch."""
    shards: Any
    longest: Any
    """(longest, 0): a size."""


class ReachInputs(NamedTuple):
    """And of each kind of attention, causal or not, as ``packc.distributed.reach.Reach`` has it."""

    sent: Any
    left: Any
    spans: Any
    of_cut: Any
    sends: list[Any]
    """Of each rank, as are ``receives``."""
    receives: list[Any]

    @classmethod
    def names(cls, kind: str, ranks: int) -> list[str]:
        """In the order in which the graph takes them."""
        several = [f"{name}_{rank}" for name in cls._fields[-2:] for rank in range(ranks)]
        return [f"{name}_{kind}" for name in (*cls._fields[:-2], *several)]

    @classmethod
    def of(cls, flat: list[Any]) -> ReachInputs:
        singles, several = flat[: len(cls._fields) - 2], flat[len(cls._fields) - 2 :]
        return cls(*[*singles, several[: len(several) // 2], several[len(several) // 2 :]])

    def flat(self) -> list[Any]:
        return [*self[:-2], *self.sends, *self.receives]


class Sharded(Packed):
    """Values gathered by this rank's part of the index; mixers exchange states, sums are those of all ranks.

    ``reaches``: of attention that is causal, or not.
    """

    INPUTS = Inputs._fields
    is_part = True

    def __init__(
        self, write: Write, inputs: Inputs, reaches: dict[bool, ReachInputs], mask: fx.Node, shape: Any, group: Ranks
    ) -> None:
        super().__init__(write, inputs, mask, shape)
        self.inputs, self.reaches, self.group = inputs, reaches, group
        self._by_position = inputs.by_position
        self._longest: fx.Node | None = None

    def mixer(self, call: Call) -> Call:
        name = call.target._schema.name.removeprefix("packc::")  # type: ignore[attr-defined]
        given = dict(zip(call.arguments, call.args, strict=True))
        target = getattr(getattr(torch.ops.packc, f"{name}_sharded", None), "default", None)
        if target is None:
            raise NotPackable(f"{name} has no form on a part of the tokens")
        if given.get("initial_state") is not None or given.get("output_final_state"):
            raise NotPackable(f"{name} takes or returns states of documents, of which ranks have parts")
        if isinstance(given["cu_seqlens"], InChunks):
            raise NotPackable(f"{name} in chunks of documents has no form on a part of the tokens")
        told = {"cu_seqlens": self.cu_seqlens, "exchange": "all_gather", "near": False, **self.group._asdict()}
        told |= {each: getattr(self.inputs, each) for each in ("places", "documents", "ranks")}
        told |= {"enters": True, "leaves": True}  # as far as a graph for all ranks knows
        if "causal" in given:
            told |= self.reaches[given["causal"]]._asdict()
        wanted = [argument.name for argument in target._schema.arguments]
        lost = [each for each, value in given.items() if each not in wanted and value not in (None, False, 0)]
        if lost:
            raise NotPackable(f"{name} on a part of the tokens does not take {', '.join(lost)}")
        return Call(target, tuple({**given, **told}[each] for each in wanted), {})

    def total(self, value: fx.Node) -> fx.Node:
        return self.write(torch.ops.packc.total_over_ranks.default, value, self.group.group)

    def _unpacked(self, value: fx.Node) -> fx.Node:
        if self._longest is None:
            self._longest = self.write(torch.ops.aten.sym_size.int, self.inputs.longest, 0)
        places = self.inputs.shards, self._longest, self.group.size, self.group.group
        tokens = self.write(torch.ops.packc.unshard.default, value, *places)
        sizes = self.padded.batch, self.padded.length
        return self.write(torch.ops.packc.unpack.default, tokens, self.inputs.whole, *sizes)


def refuse_what_looks_across_ranks(graph: Graph) -> None:
    """
    Raises:
        NotPackable: an op would run on all tokens of all ranks, or draws random numbers, which ranks do not share.
    """
    if graph.requirements.padded_mixers:
        raise NotPackable(str(graph.requirements.padded_mixers[0]))
    for node in graph.gm.graph.nodes:
        if node not in graph.forms.packed and node not in graph.forms.padded:
            continue
        where = f"{node.target} in {module_path(node) or 'the model'}"
        reading = graph.tokens.readings.get(node)
        if reading is not None and reading.padded is not None and node in graph.forms.packed:
            raise NotPackable(f"{where}: looks along the sequence, and {reading.padded}")
        if is_random(node) and not all(map(_draws_nothing, ops_of(node))):
            raise NotPackable(f"{where}: draws random numbers")


def _draws_nothing(node: fx.Node) -> bool:
    if not isinstance(node.target, OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return True
    given = arguments_of(node)
    return given.get("train") is False or given.get("p", given.get("dropout_p")) in (0, 0.0)
