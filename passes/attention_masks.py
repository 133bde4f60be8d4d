"""What an attention mask, made in the graph from the padding mask, lets tokens see.

Models make it in a dozen ways, and libraries change theirs with every release: it is not recognised by how it is
written but tried, on padding masks of every kind, and whatever the other inputs hold that it may be made from.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from packc.passes.asks import HidesKeys, HidesPadding
from packc.passes.axes import BATCH, OTHER, SEQ, value_of
from packc.passes.fills import fills
from packc.passes.graph import Graph
from packc.passes.mask_graphs import Fill, MaskGraph, Sizes, made_from, number, shape_of
from packc.passes.varlen_form import added_biases
from packc.passes.visible import Band, Biased, Chunks, Other, Pairs, Seen, by_distance, visible

log = logging.getLogger(__name__)

_Found = TypeVar("_Found")

_OF_QUERIES = (BATCH, OTHER, SEQ, OTHER), (BATCH, SEQ, OTHER, OTHER)
_LARGEST = 2**28
"""Elements of a mask that is tried; a larger one is not said to hide anything."""
_SHORT = 5
_BEYOND = 35
"""Positions to try behind the one where a mask may change."""
_LARGEST_BEYOND = 2**26
"""Elements of a mask that is tried at another length than the example's."""


def attention_masks(graph: Graph) -> Graph:
    """Find what each attention mask lets tokens see; nothing is noted of one that shows them padding.

    Where the length is symbolic, masks are tried at other lengths too: beyond every number in what makes them, where a
    window or a table may end. One that cannot be is guarded to be no longer than the longest tried.
    """
    masks = [ask.mask for _, ask in graph.asks(HidesPadding)]
    seen: dict[fx.Node, Seen] = _tried(graph, masks, _seen_through)
    biased = _tried(graph, [mask for mask in masks if seen.get(mask) is Other.TOKENS], _biased)
    biased |= _tried(graph, [each for node in graph.tokens.readings for each in added_biases(node)], _biases_alone)
    keys = [ask.mask for _, ask in graph.asks(HidesKeys)]
    return replace(graph, seen=seen, biased=biased, hides_keys=_tried(graph, keys, _keys_seen))


def _tried(
    graph: Graph, masks: Iterable[fx.Node], look: Callable[[Graph, fx.Node], _Found | None]
) -> dict[fx.Node, _Found]:
    """What ``look`` finds of each."""
    results: dict[fx.Node, _Found] = {}
    for mask in dict.fromkeys(masks):  # of all layers, usually one
        try:
            found = look(graph, mask)
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            log.info("%s could not be tried: %r", mask.name, error)
            continue
        if found is not None:
            results[mask] = found
    return results


def _keys_seen(graph: Graph, attention_mask: fx.Node) -> Seen | None:
    """What a mask ``(B or 1, heads or 1, queries or 1, L)`` that hides padded keys shows in every row that has tokens:
    all that are none, or not. None of one that shows padding."""
    made = made_from(graph, attention_mask)
    batch, length = graph.sizes
    if made is None or made.padding is None:
        return None
    lengths = list(other_lengths(made, batch, length)) if isinstance(length, torch.SymInt) else []
    queries = value_of(attention_mask).shape[-2:-1]
    # As many queries as keys, where their number is another symbol.
    of_queries = [size.node.expr for size in queries if isinstance(size, torch.SymInt)]
    shown = []
    for sizes in ({}, *lengths):
        longest = dict.fromkeys(of_queries, sizes[length.node.expr]) if sizes else {}
        shown.append(_keys_seen_at(made, batch, length, {**longest, **sizes}))
        if shown[-1] is None:
            return None
    return Band(causal=False) if all(shown) and not made.others else Other.TOKENS


def _keys_seen_at(made: MaskGraph, batch: Any, length: Any, sizes: Sizes) -> bool | None:
    """Whether all tokens are seen as they are; None if padding is."""
    shape = shape_of(value_of(made.nodes[-1]), sizes)
    batch, length = (int(number(size, sizes)) for size in (batch, length))
    if len(shape) != 4 or shape[3] != length or shape[0] not in (1, batch) or _elements(made, sizes) > _LARGEST:
        return None
    positions, every = torch.arange(length).expand(batch, length), True
    for padding in paddings(batch, length):
        has_tokens = padding.any(1, keepdim=True)
        hidden, tokens = (~padding & has_tokens)[:, None, None], (padding & has_tokens)[:, None, None]
        for fill in fills(made):
            mask = made.run(padding, positions, fill, sizes)
            shown = visible(mask)
            if bool((shown & hidden).any()):
                return None
            as_they_are = shown if mask.dtype == torch.bool else mask == 0
            every &= not bool((tokens & ~as_they_are).any())
    return every


def _seen_through(graph: Graph, attention_mask: fx.Node) -> Seen | None:
    made = made_from(graph, attention_mask)
    seen = None if made is None else _band(graph, made)
    # What another input tells apart, as token ids may documents, need not be among what was tried.
    return Other.TOKENS if made is not None and made.others and isinstance(seen, (Band, Chunks)) else seen


def _biased(graph: Graph, attention_mask: fx.Node) -> Biased | None:
    """Of a mask that adds something to the scores of pairs that are seen, what that is."""
    made = _made_from_queries(graph, attention_mask)
    if made is None:
        return None
    band = _band(graph, made, made.others[0])
    return Biased(band, made.others[0]) if isinstance(band, Band) else None


def _biases_alone(graph: Graph, added: fx.Node) -> Biased | None:
    """Of what is added beside a mask, to all pairs."""
    made = _made_from_queries(graph, added)
    if made is None:
        return None
    band = _band(graph, replace(made, padding=None), made.others[0])
    return Biased(band, made.others[0]) if band == Band(causal=False) else None


def _made_from_queries(graph: Graph, value: fx.Node) -> MaskGraph | None:
    """What makes a value of numbers of each query and head, the only ones of tokens, which are its only ``others``."""
    made = made_from(graph, value)
    if made is None or len(made.others) != 1:
        return None
    of_queries = [node for node in made.nodes[:-1] if graph.tokens.layout(node) in _OF_QUERIES]
    return made.behind(of_queries[-1]) if of_queries else None


def _band(graph: Graph, made: MaskGraph, biases: fx.Node | None = None) -> Seen | None:
    """What a mask that hides padding shows, and adds ``biases`` by distance to; None of another."""
    batch, length = graph.sizes
    pairs = Pairs()
    places = graph.tokens.layout(biases) if biases is not None else None

    def added(fill: Fill, sizes: Sizes) -> Tensor | float:
        if biases is None or places is None:
            return 0.0
        values = fill(shape_of(value_of(biases), sizes), value_of(biases).dtype, 0)
        return by_distance(values if places.index(SEQ) == 2 else values.transpose(1, 2))

    others = list(other_lengths(made, batch, length)) if isinstance(length, torch.SymInt) else []
    for sizes in ({}, *others):
        if not _try(made, batch, length, sizes, pairs, added):
            return None
    seen = pairs.band()
    if seen is not Other.TOKENS or biases is not None or made.positions:
        return seen  # chunks are of rows, whatever documents positions say that there are
    sizes_tried = [*others, {}]
    chunks = (Chunks(size) for size in sorted(made.constants()) if size > 1)
    return next((each for each in chunks if all(_cuts(made, batch, length, at, each) for at in sizes_tried)), seen)


def other_lengths(made: MaskGraph, batch: int | torch.SymInt, length: torch.SymInt) -> Iterator[Sizes]:
    """Sizes to try besides the example's, where the length is symbolic."""
    hint, last = int(number(length, {})), max(made.constants(), default=0)
    rows = {batch.node.expr: 2} if isinstance(batch, torch.SymInt) else {}

    def at(longest: int) -> Sizes:
        return {**rows, length.node.expr: longest}

    def fits(longest: int) -> bool:
        return _elements(made, at(longest)) <= _LARGEST_BEYOND

    yield at(_SHORT)
    beyond = [longest for longest in (2 * last + 3, last + _BEYOND) if longest <= hint or fits(longest)]
    if not beyond:
        beyond = [max([hint, *(2**n for n in range(16) if fits(2**n))])]
        bool(length <= beyond[0])  # which Dynamo guards, as a window may end behind it
    if beyond[0] > hint:
        yield at(beyond[0])


def _elements(made: MaskGraph, sizes: Sizes) -> int:
    return prod(shape_of(value_of(made.nodes[-1]), sizes))


def _try(
    made: MaskGraph,
    batch: int | torch.SymInt,
    length: int | torch.SymInt,
    sizes: Sizes,
    pairs: Pairs,
    added: Callable[[Fill, Sizes], Tensor | float],
) -> bool:
    """Whether it hides padding at these sizes, whatever the padding is; what tokens see goes into ``pairs``."""
    batch, length = (int(number(size, sizes)) for size in (batch, length))
    shape = shape_of(value_of(made.nodes[-1]), sizes)
    if len(shape) != 4 or shape[3] != length or shape[2] not in (1, length) or shape[0] not in (1, batch):
        return False
    if _elements(made, sizes) > _LARGEST:
        return False
    return all(
        pairs.add(made.run(padding, positions, fill, sizes), padding, documents, added(fill, sizes))
        for padding in _paddings_of(made, batch, length)
        for positions, documents in itertools.islice(_documents(batch, length), None if made.positions else 1)
        for fill in fills(made)
    )


def _cuts(made: MaskGraph, batch: int | torch.SymInt, length: int | torch.SymInt, sizes: Sizes, chunks: Chunks) -> bool:
    """Whether a mask that hides padding, and goes by no positions, shows chunks at these sizes."""
    batch, length = (int(number(size, sizes)) for size in (batch, length))
    positions = torch.arange(length).expand(batch, length)
    for padding in _paddings_of(made, batch, length):
        tokens = padding[:, None, :, None] & padding[:, None, None, :]
        for fill in fills(made):
            mask = made.run(padding, positions, fill, sizes)
            wanted = chunks.show(padding)[:, None]
            as_said = mask if mask.dtype == torch.bool else torch.where(visible(mask), mask == 0, False)
            if not (as_said & tokens).equal((wanted & tokens).expand(*(as_said & tokens).shape)):
                return False
    return True


def _paddings_of(made: MaskGraph, batch: int, length: int) -> Iterable[Tensor]:
    return paddings(batch, length) if made.padding is not None else [torch.ones(batch, length, dtype=torch.bool)]


def _documents(batch: int, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Positions (B, L) and the documents that they are of: one a row, from its first position on or from a later one,
    and several."""
    generator = torch.Generator().manual_seed(0)
    place = torch.arange(length).expand(batch, length)
    one = torch.zeros(batch, length, dtype=torch.int64)
    later = torch.randint(0, 4, (batch, 1), generator=generator)
    yield place, one
    yield place + later, one
    for share in (0.1, 0.4):
        begins = torch.rand(batch, length, generator=generator) < share
        start = torch.where(begins, place, 0).cummax(1).values
        yield place - start + later * (start == 0), start


def paddings(batch: int, length: int) -> Iterator[Tensor]:
    """(B, L), true at tokens. Each row in turn has padding nowhere, on the left, on the right, on both sides, and
    anywhere."""
    generator = torch.Generator().manual_seed(0)
    positions = torch.arange(length)
    for turn in range(5):
        rows = []
        for row in range(batch):
            first, end = (torch.rand(2, generator=generator).sort().values * (length + 1)).long().tolist()
            left, right = positions >= first, positions < end
            kinds = (right | True, left, right, left & right, torch.rand(length, generator=generator) < 0.5)
            rows.append(kinds[(turn + row) % 5])
        yield torch.stack(rows)
