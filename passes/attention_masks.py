"""Whether an attention mask, made in the graph from the padding mask, hides padding from tokens.

Models make it in a dozen ways, and libraries change theirs with every release: it is not recognised by how it is
written but tried, on padding masks of every kind, and whatever the other inputs hold that it may be made from.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from packc.passes.axes import value_of
from packc.passes.graph import Graph

log = logging.getLogger(__name__)

_LARGEST = 2**28
"""Elements of a mask that is tried; a larger one is not said to hide anything."""
_MOST_NODES = 500
"""Of the graph that makes it; a mask of more is computed by the model."""


def hides_padding(graph: Graph, attention_mask: fx.Node) -> bool:
    """Whether no token sees a padded key, whatever the padding mask is; False if that cannot be found out."""
    needed = _made_from(graph, attention_mask)
    sizes, of_mask = _sizes(attention_mask), _sizes(graph.mask)
    if needed is None or sizes is None or of_mask is None or prod(sizes) > _LARGEST:
        return False
    batch, length = of_mask
    if sizes[-1] != length or sizes[-2] not in (1, length) or sizes[0] not in (1, batch):
        return False
    others = [n for n in needed if n.op == "placeholder" and n is not graph.mask and isinstance(value_of(n), Tensor)]
    if any(_sizes(other) is None for other in others):
        return False
    try:
        return all(
            _hides(graph.gm, needed, attention_mask, {graph.mask: padding, **{other: fill(other) for other in others}})
            for padding in _paddings(graph.mask, batch, length)
            for fill in ((_zeros, _ones, _random) if others else (_zeros,))
        )
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        log.info("%s could not be tried: %r", attention_mask.name, error)
        return False


def _hides(gm: fx.GraphModule, needed: list[fx.Node], attention_mask: fx.Node, values: dict[fx.Node, Any]) -> bool:
    """Whether it does for these inputs, the first of which is the padding mask."""
    real = next(iter(values.values())) != 0
    for node in needed:
        if node not in values:
            values[node] = _value(gm, node, values)
    mask = values[attention_mask]
    visible = mask if mask.dtype == torch.bool else mask > max(torch.finfo(mask.dtype).min / 2, -1e8)
    of_tokens = real[:, None, :, None] & ~real[:, None, None, :]  # (B, 1, queries, keys)
    return not bool((visible & of_tokens).any())


def _value(gm: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    if node.op == "get_attr":
        return getattr(gm, str(node.target)).cpu()
    number = _number(value_of(node))
    if number is not None:
        return number
    # On the CPU, where an index out of range is an error and not the end of the process.
    args, kwargs = fx.node.map_aggregate(
        (node.args, node.kwargs),
        lambda x: values[x] if isinstance(x, fx.Node) else torch.device("cpu") if isinstance(x, torch.device) else x,
    )
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _made_from(graph: Graph, value: fx.Node) -> list[fx.Node] | None:
    """What a value is made from, in the order of the graph; None if that cannot be computed here."""
    needed, queue = set[fx.Node](), [value]
    while queue:
        if len(needed) > _MOST_NODES:
            return None
        node = queue.pop()
        if node in needed:
            continue
        needed.add(node)
        if _number(value_of(node)) is not None:
            continue  # a size is known without what has it
        constant = node.op in ("placeholder", "get_attr") and isinstance(value_of(node), Tensor)
        if not constant and (node.op != "call_function" or node.is_impure()):
            return None
        queue.extend(node.all_input_nodes)
    return [node for node in graph.gm.graph.nodes if node in needed]


def _number(value: Any) -> int | float | bool | None:
    """A size as the example has it; None of what is no number."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value.node.hint
    return value if isinstance(value, (int, float, bool)) else None


def _sizes(node: fx.Node) -> list[int] | None:
    """The shape of a value, as the example has it; None where nobody knows before the graph runs."""
    sizes = [_number(size) for size in value_of(node).shape]
    known = [size for size in sizes if isinstance(size, int)]
    return known if len(known) == len(sizes) else None


def _zeros(node: fx.Node) -> Tensor:
    return torch.zeros(_sizes(node) or (), dtype=value_of(node).dtype)


def _ones(node: fx.Node) -> Tensor:
    return torch.ones(_sizes(node) or (), dtype=value_of(node).dtype)


def _random(node: fx.Node) -> Tensor:
    dtype, shape = value_of(node).dtype, _sizes(node) or []
    values = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    if dtype == torch.bool:
        return values > 0.5
    # Numbers of either sign; positions within a row.
    return (values * 8 - 4 if dtype.is_floating_point else values * max([1, *shape])).to(dtype)


def _paddings(mask: fx.Node, batch: int, length: int) -> Iterator[Tensor]:
    """Masks of which each row in turn has padding nowhere, on the left, on the right, on both sides, and anywhere."""
    generator = torch.Generator().manual_seed(0)
    positions = torch.arange(length)
    for turn in range(5):
        rows = []
        for row in range(batch):
            first, end = (torch.rand(2, generator=generator).sort().values * (length + 1)).long().tolist()
            left, right = positions >= first, positions < end
            kinds = (right | True, left, right, left & right, torch.rand(length, generator=generator) < 0.5)
            rows.append(kinds[(turn + row) % 5])
        yield torch.stack(rows).to(value_of(mask).dtype)
