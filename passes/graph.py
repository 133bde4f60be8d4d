"""What travels through the passes: a graph, and what they have found out of its values."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import fx

from packc.passes.asks import Ask
from packc.passes.axes import Kind, Layout, covers_tokens, value_of
from packc.passes.reading import Reading
from packc.passes.visible import Biased, Seen
from packc.private_torch import private_torch

with private_torch():
    from torch.fx._lazy_graph_module import _make_graph_module

if TYPE_CHECKING:
    from packc.passes.choose import Forms
    from packc.passes.requirements import Requirements
    from packc.passes.work import Work

CU_SEQLENS = "packc_cu_seqlens"
"""What one of a packed graph's further inputs is called, with a number from the second sequence on."""

AnAsk = TypeVar("AnAsk", bound=Ask)


@dataclass
class Tokens:
    """What becomes of token axes on their way through a graph."""

    kinds: dict[fx.Node, Kind | list[Kind]] = field(default_factory=dict)
    """What a value is to the tokens, if anything; a list for an op with several results."""
    padding: bool = True
    """Whether there may be places without a token."""
    readings: dict[fx.Node, Reading] = field(default_factory=dict)
    """How an op reads on tokens."""
    refusals: dict[fx.Node, str] = field(default_factory=dict)
    """Why an op has no reading although an operand has token axes."""

    def layout(self, value: Any) -> Layout | None:
        """Where the axes of a value with token axes are; None for any other, and for an op with several results."""
        kind = self.kinds.get(value) if isinstance(value, fx.Node) else None
        return kind if isinstance(kind, tuple) else None

    def has_axes(self, node: fx.Node) -> bool:
        """Whether a value, or each of several results, has one entry per token."""
        kind = self.kinds.get(node)
        return all(map(covers_tokens, kind)) if isinstance(kind, list) else covers_tokens(kind)


class Ranks(NamedTuple):
    """A group over which tokens are cut."""

    group: str
    """Its name, the same on every rank."""
    size: int
    local_outputs: bool = False
    """Whether outputs are of this rank's tokens alone; otherwise they are whole on every rank."""
    by_work: bool = False
    """Whether ranks are to have equally much to do; otherwise they have equally many tokens."""


@dataclass
class Graph:
    """A padded graph on its way to its packed form; each pass takes one and returns one with more in it.

    What a pass finds is there after it, and not asked for before: packc/pipeline.py has the order.
    """

    gm: fx.GraphModule
    inputs: list[Any]
    """Fakes of the graph's inputs."""
    masks: list[fx.Node] = field(default_factory=list)
    """Inputs that may be the padding mask, the likeliest first."""
    mask: fx.Node = None  # type: ignore[assignment]
    """The one that the pack goes by; without padding, an input (B, L, ...) of the tokens."""
    padding: bool = True
    """Whether anything is left out of the pack; if not, it is made for the documents within its rows."""
    tokens: Tokens = field(default_factory=Tokens)
    zero: set[fx.Node] = field(default_factory=set)
    """Values known to be zero at padding."""
    seen: dict[fx.Node, Seen] = field(default_factory=dict)
    """What attention masks that hide padding let tokens see."""
    biased: dict[fx.Node, Biased] = field(default_factory=dict)
    """Of such masks, and of what else is added to scores, those that add biases by distance."""
    hides_keys: dict[fx.Node, Seen] = field(default_factory=dict)
    """What attention masks that hide padding from another sequence's queries let these see."""
    zero_before: set[fx.Node] = field(default_factory=set)
    """Values known to be zero at padding before a row's first token: these, and what mixers make of zeros."""
    forms: Forms = None  # type: ignore[assignment]
    """In which forms each value is computed."""
    requirements: Requirements = None  # type: ignore[assignment]
    """What the packed graph asks of each batch."""
    streams: list[Requirements] = field(default_factory=list)
    """The same of every sequence that is packed, in the order of their ``index`` and ``cu_seqlens``."""
    with_padding: Graph | None = None
    """The packed graph for batches that keep padding, where attention in ``gm`` would see it."""
    ranks: Ranks | None = None
    """Whose parts of the tokens are to be computed; None: all are computed here."""
    local_outputs: list[int] = field(default_factory=list)
    """Which outputs are ``(1, T_r, ...)``, of this rank's tokens."""
    work: Work | None = None
    """What there is to do for a token, if ranks' parts are made by it."""
    no_mask: str | None = None
    """Without padding: why nothing is taken for its mask."""

    @property
    def sizes(self) -> tuple[Any, Any]:
        """B and L."""
        batch, length = value_of(self.mask).shape[:2]
        return batch, length

    @property
    def placeholders(self) -> list[fx.Node]:
        return list(self.gm.graph.find_nodes(op="placeholder"))

    def asks(self, kind: type[AnAsk]) -> Iterator[tuple[fx.Node, AnAsk]]:
        """Every ask of one kind, with the node that asks."""
        for node, reading in self.tokens.readings.items():
            for ask in reading.asks:
                if isinstance(ask, kind):
                    yield node, ask


def module_of(root: torch.nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A module whose code, in a compilation of Dynamo's, is written when somebody reads or runs it; few are."""
    return _make_graph_module(root, graph)


def call_like(graph: fx.Graph, like: fx.Node, target: Any, args: tuple[Any, ...], kwargs: Any = None) -> fx.Node:
    """A call more in the padded graph, where it is being inserted, with what is known of the origin of ``like``."""
    node = graph.call_function(target, args, kwargs or {})
    node.meta = {name: value for name, value in like.meta.items() if name != "val"}
    fakes = fx.map_arg((args, kwargs or {}), value_of)
    node.meta["val"] = target(*fakes[0], **fakes[1])
    return node


def is_item(node: fx.Node) -> bool:
    """Whether a node is one result of an op with several."""
    return node.target is operator.getitem


def switches_mode(node: fx.Node) -> bool:
    """Whether a node turns grad mode or autocast on or off for what follows."""
    return node.op == "call_function" and not isinstance(node.target, torch._ops.OpOverload) and node.is_impure()
