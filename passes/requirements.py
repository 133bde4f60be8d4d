"""What a packed graph asks of each batch: how much padding it must keep for every result to be exact."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from packc.passes.asks import HidesKeys, HidesPadding, IgnoredLabels, KeepLeft, KeepRight
from packc.passes.axes import value_of
from packc.passes.choose import reads_as_is
from packc.passes.crossings import moved, one_document
from packc.passes.graph import AnAsk, Graph
from packc.passes.module_names import module_path
from packc.passes.pack_attention import packed_attention
from packc.passes.reasons import Boundary, NotPackable
from packc.passes.sequences import other_masks
from packc.passes.sources import argument_path, is_parameter
from packc.passes.unpacked import boundaries_of, is_of_another_stream, padded_mixers
from packc.passes.visible import Band

_MAX_OPS = 64
_RESHAPES = {torch.ops.aten.reshape.default}
_FLATTENS = {torch.ops.aten.view.default, torch.ops.aten.flatten.using_ints, torch.ops.aten.contiguous.default}
_NO_KEYS = "another sequence attends to a row without tokens"


@dataclass(frozen=True)
class Labels:
    """Labels of a loss and the label it ignores."""

    graph: fx.GraphModule
    """The padded graph's inputs (and, of a further sequence, None for what those before it take) -> its labels, shifted
    as the loss reads them, B*L elements in row-major order."""
    ignore_index: int
    moved: bool = False
    """Whether they are other tokens' labels, the next ones'."""


@dataclass
class Requirements:
    """What a packed graph asks of each batch, and what there is to report of it."""

    mask: int
    """Position of the mask among the inputs. ``index`` and ``cu_seqlens`` follow after the last of them."""
    mask_path: str = ""
    paths: list[str] = field(default_factory=list)
    """Of all inputs of the sequence."""
    padding: bool = True
    """Whether it is a mask; otherwise an input (B, L, ...) of tokens, and nothing is left out."""
    other_masks: list[int] = field(default_factory=list)
    """Positions of further masks of the same tokens; rows of which one marks tokens where the mask has padding are not
    packed."""
    outside: str | None = None
    """The reason of such rows."""
    keep_left: str | None = None
    """Why left padding stays in the pack; None: it is left out."""
    keep_right: str | None = None
    keep_empty: str | None = None
    """Why rows without a token stay whole."""
    refuse_empty: bool = False
    """Whether there must be none, unless other sequences have no token in that row either."""
    labels: list[Labels] = field(default_factory=list)
    live: list[Labels] = field(default_factory=list)
    """Places that a head reads, as labels that are not 0."""
    attends: bool = False
    """Whether some attention gives, at padding, what is not stock's."""
    only_tokens: bool = False
    """Whether some attention would see the padding of a batch that keeps any."""
    one_document: str | None = None
    """Why a row must be one document; None if it may hold several."""
    one_document_of_positions: str | None = None
    """The same of documents that positions begin, which masks may keep apart."""
    reads_positions: bool = False
    """Whether an attention mask goes by positions: packed attention knows nothing of some that are left out."""
    attention: list[bool] = field(default_factory=list)
    """Kinds of packed attention: causal, or not."""
    returns_tokens: bool = False
    """Whether some output has values of tokens, zero at padding."""
    labels_may_follow: bool = False
    """Whether labels may count outside of the graph."""
    mixers: list[tuple[str, str]] = field(default_factory=list)
    """(op, module path) of each packed mixer."""
    padded_mixers: list[Boundary] = field(default_factory=list)
    """The others, and why they run padded."""
    boundaries: list[Boundary] = field(default_factory=list)


def requirements(graph: Graph) -> Graph:
    """Collect them from the readings of all that is computed packed.

    Raises:
        NotPackable: what must be asked is not known before the model runs.
    """
    inputs, packed = graph.placeholders, graph.forms.packed
    others = other_masks(graph) if graph.padding else []
    readings = graph.tokens.readings
    result = Requirements(
        mask=inputs.index(graph.mask),
        mask_path=argument_path(graph.mask),
        paths=[argument_path(node) for node in inputs if node in graph.tokens.kinds],
        padding=graph.padding,
        one_document=one_document(graph),
        one_document_of_positions=one_document(graph, of_positions=True),
        reads_positions=any(isinstance(seen, Band) and seen.apart for seen in graph.seen.values()),
        other_masks=[inputs.index(other) for other in others],
        keep_left=_first(
            (node, ask) for node, ask in _packed(graph, KeepLeft) if graph.zero_before.isdisjoint(ask.unless_zero)
        ),
        keep_right=_first(
            (node, ask) for node, ask in _packed(graph, KeepRight) if graph.zero.isdisjoint(ask.unless_zero)
        ),
        keep_empty=next((_NO_KEYS for _ in _packed(graph, HidesKeys)), None),
        refuse_empty=any(value_of(ask.mask).is_floating_point() for _, ask in _packed(graph, HidesKeys)),
        labels=_labels(graph),
        attends=any(node in packed for node, _ in graph.asks(HidesPadding)),
        only_tokens=any(
            readings[node].is_mixer for kind in (HidesPadding, HidesKeys) for node, _ in _packed(graph, kind)
        ),
        attention=sorted({call.args[call.arguments.index("causal")] for _, call in packed_attention(graph)}),
        live=[Labels(_graph_of(graph, places, "what a head reads"), 0) for places in _live(graph)],
        returns_tokens=any(
            each in graph.forms.returned or (each in packed and not reads_as_is(each, graph.tokens))
            for each in graph.gm.graph.output_node().all_input_nodes
        ),
        mixers=[
            (str(node.target), module_path(node))
            for node, reading in readings.items()
            if reading.is_mixer and node in packed and not is_of_another_stream(node)
        ],
        padded_mixers=padded_mixers(graph, packed),
        boundaries=boundaries_of(graph),
    )
    result.labels_may_follow = result.returns_tokens and not result.labels
    if others:
        names = ", ".join(map(argument_path, others))
        result.outside = f"{names} marks tokens where {argument_path(graph.mask)} has padding"
    return replace(graph, requirements=result)


def _packed(graph: Graph, kind: type[AnAsk]) -> Iterator[tuple[fx.Node, AnAsk]]:
    return ((node, ask) for node, ask in graph.asks(kind) if node in graph.forms.packed)


def _first(asks: Iterator[tuple[fx.Node, KeepLeft | KeepRight]]) -> str | None:
    return next((f"{module_path(node) or 'the model'}: {ask.reason}" for node, ask in asks), None)


def _labels(graph: Graph) -> list[Labels]:
    """Those of each packed loss, once."""
    asked = dict.fromkeys(ask for _, ask in _packed(graph, IgnoredLabels))
    return [
        Labels(_graph_of(graph, ask.labels, "the labels of the loss"), ask.ignore_index, moved(graph, ask.labels))
        for ask in asked
    ]


def _live(graph: Graph) -> list[fx.Node]:
    return graph.forms.live if graph.padding else []


def _graph_of(graph: Graph, labels: fx.Node, what: str) -> fx.GraphModule:
    labels, needed = _same_elements(labels), set()
    queue = [labels]
    while queue:
        node = queue.pop()
        if node in needed:
            continue
        needed.add(node)
        queue.extend(map(_same_elements, node.all_input_nodes) if node.target in _RESHAPES else node.all_input_nodes)
        if is_parameter(node) or node in graph.forms.packed_only or len(needed) > _MAX_OPS:
            raise NotPackable(f"{what} ({labels.name}) is computed by the model")
    result = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.gm.graph.nodes:
        if node.op == "placeholder" or node in needed:
            of = _same_elements if node.target in _RESHAPES else (lambda each: each)
            copies[node] = result.node_copy(node, lambda each, of=of: copies[of(each)])  # type: ignore[misc]
    result.output(copies[labels])
    return fx.GraphModule(graph.gm, result)


def _same_elements(node: fx.Node) -> fx.Node:
    """What has the elements of a value in the same order: each batch is asked them, and every op counts."""
    while node.target in _RESHAPES | _FLATTENS:
        node = node.all_input_nodes[0]
    return node
