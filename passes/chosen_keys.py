"""Attention masks by which queries see keys that the model chooses, as an indexer does for sparse attention.

What scores keys and picks some looks along the sequence, by ops that no rule follows, at what the model computes of
tokens. It runs padded, on that scattered back: zero at padding, where stock has values of its own; and that is well if
what tokens see does not hang on these. Like masks themselves that is not recognised but tried, with zeros there and
with numbers as large as no token's.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, fx

from packc.passes.asks import HidesPadding
from packc.passes.attention_masks import other_lengths, paddings
from packc.passes.axes import BATCH, FLAT, SEQ, TOKENS, Layout, covers_tokens, is_tensor, value_of
from packc.passes.fills import fills
from packc.passes.graph import Graph
from packc.passes.mask_graphs import Fill, MaskGraph, Sizes, made_from, number
from packc.passes.visible import Other

log = logging.getLogger(__name__)

_FAR = 1e3
"""Of numbers at padding; those that are tried at tokens are smaller."""


def choosers(graph: Graph, packed_only: set[fx.Node]) -> set[fx.Node]:
    """What makes nothing but masks of chosen keys, from ``packed_only`` values on, and may read them scattered back."""
    found = set[fx.Node]()
    if not graph.padding:
        return found  # nothing is left out: whose tokens are a document's is what counts there
    masks = {ask.mask for _, ask in graph.asks(HidesPadding) if graph.seen.get(ask.mask) is Other.TOKENS}
    begins = _begins(graph, packed_only) if masks else found
    for mask in masks:
        made = made_from(graph, mask, begins)
        if made is None or begins.isdisjoint(made.others) or not _is_only_a_mask(graph, mask):
            continue
        if graph.tokens.refusals.keys().isdisjoint(made.nodes) or not _hangs_on_tokens(graph, made, begins):
            continue
        found.update(node for node in made.nodes if node not in made.others)
    return _of_nothing_else(found, masks)


def _begins(graph: Graph, packed_only: set[fx.Node]) -> set[fx.Node]:
    """Numbers of tokens that are computed packed, of what no op without a packed form has read; and not joined with the
    mask, of which is known what it is at padding."""
    beyond, refused = set[fx.Node](), graph.tokens.refusals
    for node in graph.gm.graph.nodes:
        read = set(node.all_input_nodes)
        joins = node.target is torch.ops.aten.cat.default and not read <= packed_only
        if not beyond.isdisjoint(read) or ((joins or node in refused) and not packed_only.isdisjoint(read)):
            beyond.add(node)
    return {
        node
        for node in packed_only - beyond
        if is_tensor(node)
        and value_of(node).is_floating_point()
        and covers_tokens(layout := graph.tokens.layout(node))
        and FLAT not in layout
    }


def _is_only_a_mask(graph: Graph, mask: fx.Node) -> bool:
    asking = {node for node, ask in graph.asks(HidesPadding) if ask.mask is mask}
    return asking.issuperset(mask.users) and all(node.all_input_nodes.count(mask) == 1 for node in asking)


def _of_nothing_else(made: set[fx.Node], masks: set[fx.Node]) -> set[fx.Node]:
    """What makes nothing but masks, of all that makes them."""
    alone = masks & made
    for node in sorted(made - masks, reverse=True):
        if alone.issuperset(node.users):
            alone.add(node)
    return alone


def _hangs_on_tokens(graph: Graph, made: MaskGraph, begins: set[fx.Node]) -> bool:
    """Whether tokens see the same whatever is at padding."""
    batch, length = graph.sizes
    lengths = other_lengths(made, batch, length) if isinstance(length, torch.SymInt) else ()
    try:
        return all(_same(graph, made, begins, sizes) for sizes in ({}, *lengths))
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        log.info("%s could not be tried: %r", made.nodes[-1].name, error)
        return False


def _same(graph: Graph, made: MaskGraph, begins: set[fx.Node], sizes: Sizes) -> bool:
    batch, length = (int(number(size, sizes)) for size in graph.sizes)
    positions = torch.arange(length).expand(batch, length)
    layouts = [graph.tokens.layout(each) if each in begins else None for each in made.others]

    def shown(padding: Tensor, fill: Fill, far: float) -> Tensor:
        def with_padding(shape: list[int], dtype: torch.dtype, which: int) -> Tensor:
            values, layout = fill(shape, dtype, which), layouts[which]
            if layout is None:
                return values
            drawn = torch.randn(shape, generator=torch.Generator().manual_seed(which))
            return torch.where(_along(padding, layout), values, (far * drawn).to(dtype))

        return made.run(padding, positions, with_padding, sizes).masked_fill(~padding[:, None, :, None], 0)

    return all(
        torch.equal(shown(padding, fill, 0), shown(padding, fill, _FAR))
        for padding in paddings(batch, length)
        for fill in fills(made)
    )


def _along(padding: Tensor, layout: Layout) -> Tensor:
    """The mask (B, L) along the axes of a value's rows and positions."""
    if TOKENS in layout:
        return padding.reshape([-1 if axis is TOKENS else 1 for axis in layout])
    rows, places = layout.index(BATCH), layout.index(SEQ)
    sizes = [1] * len(layout)
    sizes[rows], sizes[places] = padding.shape
    return (padding if rows < places else padding.mT).reshape(sizes)
