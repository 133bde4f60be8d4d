"""What a packed graph asks of each batch: how much padding it must keep for every result to be exact."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from torch import fx

from packc.passes.asks import HidesKeys, HidesPadding, IgnoredLabels, KeepLeft, KeepRight
from packc.passes.axes import value_of
from packc.passes.choose import reads_as_is
from packc.passes.crossings import one_document
from packc.passes.graph import AnAsk, Graph
from packc.passes.labels import Labels, labels_of_losses, read_places
from packc.passes.module_names import module_path
from packc.passes.pack_attention import packed_attention
from packc.passes.reasons import Boundary
from packc.passes.sequences import other_masks
from packc.passes.sources import argument_path
from packc.passes.unpacked import boundaries_of, is_of_another_stream, padded_mixers
from packc.passes.visible import Band

_NO_KEYS = "another sequence attends to a row without tokens"


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
        reads_positions=any(
            isinstance(seen, Band) and seen.apart
            for seen in [*graph.seen.values(), *(each.band for each in graph.biased.values())]
        ),
        other_masks=[inputs.index(other) for other in others],
        keep_left=_first(
            (node, ask) for node, ask in _packed(graph, KeepLeft) if graph.zero_before.isdisjoint(ask.unless_zero)
        ),
        keep_right=_first(
            (node, ask) for node, ask in _packed(graph, KeepRight) if graph.zero.isdisjoint(ask.unless_zero)
        ),
        keep_empty=next((_NO_KEYS for _ in _packed(graph, HidesKeys)), None),
        refuse_empty=any(value_of(ask.mask).is_floating_point() for _, ask in _packed(graph, HidesKeys)),
        labels=labels_of_losses(graph, _packed(graph, IgnoredLabels)),
        attends=any(node in packed for node, _ in graph.asks(HidesPadding)),
        only_tokens=any(
            readings[node].is_mixer for kind in (HidesPadding, HidesKeys) for node, _ in _packed(graph, kind)
        ),
        attention=sorted({call.args[call.arguments.index("causal")] for _, call in packed_attention(graph)}),
        live=read_places(graph),
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
