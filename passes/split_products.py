"""A product of which a mixer wants a part behind its exchange alone becomes two, where tokens are cut over ranks.

::

    both = linear(h, W)                  x = linear(h, W[:D])
    x, z = both.chunk(2, -1)      ->     z = linear(h, W[D:])
    scan(x, ..., z)                      scan(x, ..., z)

A scan waits for the state that enters it. What it sends before is not made of its gate, so the gate's product can be
made meanwhile (``passes/overlap``), which finds nothing else to do there in the forward of a Mamba: its layers are one
chain. A narrow part would read its operand a second time for little.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import getitem
from typing import Any, NamedTuple

import torch
from torch import fx

from packc.ops.mixer import MIXERS, Mixer
from packc.passes.axes import value_of
from packc.passes.graph import is_item, switches_mode

aten = torch.ops.aten

_CHUNKS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)


class _Product(NamedTuple):
    linear: fx.Node
    transposes: list[fx.Node]
    pieces: fx.Node
    """What cuts the result in two."""
    sizes: list[int]
    late: int
    """Which of the two is made where it is first wanted: behind what writes in place, past which nothing is moved."""


def split_products(gm: fx.GraphModule) -> None:
    """In the graph of a rank's shard, in place."""
    for node in list(gm.graph.nodes):
        for late in _wanted_late(node):
            product = _product(late)
            if product is not None:
                _write(gm.graph, product)
    gm.recompile()


def _wanted_late(node: fx.Node) -> Iterator[fx.Node]:
    """Values of tokens that a mixer which waits for its exchange does not need before."""
    mixer = _sharded(node)
    if mixer is None or mixer.summary is None or mixer.summary.late is not None:
        return
    for name, x in zip(mixer.tensor_names, node.args, strict=False):
        if name in mixer.per_token and name not in mixer.summary.takes and isinstance(x, fx.Node):
            yield _before_transposes(x)[0]


def _sharded(node: fx.Node) -> Mixer | None:
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "packc":
        return None
    name = node.target._opname
    return MIXERS.get(name.removesuffix("_sharded")) if name.endswith("_sharded") else None


def _before_transposes(x: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    passed: list[fx.Node] = []
    while x.target is aten.transpose.int:
        passed.insert(0, x)
        x = x.args[0]  # type: ignore[assignment]
    return x, passed


def _product(part: fx.Node) -> _Product | None:
    """Of which ``part`` is one of two, at least as wide as what the product reads."""
    pieces: Any = part.args[0] if is_item(part) else None
    if pieces is None or pieces.target not in _CHUNKS:
        return None
    linear, transposes = _before_transposes(pieces.args[0])
    if linear.target is not aten.linear.default or any(len(each.users) > 1 for each in (linear, *transposes)):
        return None
    weight = value_of(linear.args[1])
    if weight is None or weight.ndim != 2 or not all(isinstance(size, int) for size in weight.shape):
        return None
    width, read = weight.shape
    # Of (1, T, width), the graph of a shard has no other axes of tokens.
    dim = _dim(pieces.args[2] if len(pieces.args) > 2 else 0)
    for each in reversed(transposes):
        axes = [_dim(axis) for axis in each.args[1:]]
        dim = axes[1 - axes.index(dim)] if dim in axes else dim
    sizes = [len(each) for each in pieces.target(torch.empty(width), pieces.args[1])]
    if dim != 2 or len(sizes) != 2 or sizes[part.args[1]] < read or not all(map(is_item, pieces.users)):  # type: ignore[index]
        return None
    if _switches_between(linear, _first_user(part)):
        return None
    return _Product(linear, transposes, pieces, sizes, part.args[1])  # type: ignore[arg-type]


def _first_user(node: fx.Node) -> fx.Node:
    later = node.next
    while node not in later.all_input_nodes:
        later = later.next
    return later


def _switches_between(first: fx.Node, last: fx.Node) -> bool:
    """Whether grad mode or autocast is another one at ``last``."""
    while first is not last:
        if switches_mode(first):
            return True
        first = first.next
    return False


def _dim(dim: Any) -> int:
    return dim % 3


def _write(graph: fx.Graph, product: _Product) -> None:
    linear, transposes, pieces, sizes, late = product
    x, *parameters = linear.args

    def call(target: Any, like: fx.Node, *args: Any) -> fx.Node:
        node = graph.call_function(target, args)
        node.meta = {name: value for name, value in like.meta.items() if name != "val"}
        return node

    def split(parameter: Any) -> list[fx.Node | None]:
        if parameter is None:
            return [None, None]
        both = call(aten.split_with_sizes.default, linear, parameter, sizes)
        return [call(getitem, linear, both, n) for n in range(2)]

    with graph.inserting_before(linear):
        own = list(zip(*map(split, parameters), strict=True))
    for item in list(pieces.users):
        n: Any = item.args[1]
        with graph.inserting_before(_first_user(item) if n == late else linear):
            part = call(aten.linear.default, linear, x, *own[n])
            for each in transposes:
                part = call(aten.transpose.int, each, part, *each.args[1:])
        item.replace_all_uses_with(part)
        graph.erase_node(item)
    for each in (pieces, *reversed(transposes), linear):
        graph.erase_node(each)
