"""What is computed of transposed values entry by entry is computed before they are transposed.

    transpose(a) * transpose(b)         ->  transpose(a * b)
    chunk(transpose(a), 2, dim=1)       ->  the transposes of chunk(a, 2, dim=2), and so with slices
    transpose(transpose(a))             ->  a

Models write convolutions channel-first, ``(B, D, L)``, between two transposes. Eager code computes there in the order
in which values lie in memory. A compiler that does not know how many tokens there are takes ``(1, D, T)`` by its word:
it writes entry by entry, T apart, and transposes back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from packc.passes.arguments import arguments_of
from packc.passes.axes import is_tensor, value_of
from packc.passes.graph import Graph, call_like, is_item

aten = torch.ops.aten
_PARTS = {aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default}


def token_major(graph: Graph) -> Graph:
    """Transpose ``(B, D, L)`` as late as can be; no-op elsewhere."""
    nodes, changed = graph.gm.graph, False
    for node in list(nodes.nodes):
        with nodes.inserting_before(node):
            changed |= _cancel(node) or _compute(nodes, node) or _slice(nodes, node) or _split(nodes, node)
    if changed:
        nodes.eliminate_dead_code()
        graph.gm.recompile()
    return graph


def _transposed(node: Any) -> fx.Node | None:
    """Of which three axes the last two are exchanged."""
    if not is_tensor(node) or node.target is not aten.transpose.int or value_of(node).ndim != 3:
        return None
    x, *dims = node.args
    return x if {dim % 3 for dim in dims} == {1, 2} else None


def _cancel(node: fx.Node) -> bool:
    once = _transposed(node)
    twice = _transposed(once)
    if twice is not None:
        node.replace_all_uses_with(twice)
    return twice is not None


def _compute(nodes: fx.Graph, node: fx.Node) -> bool:
    if not isinstance(node.target, OpOverload) or torch.Tag.pointwise not in node.target.tags or not is_tensor(node):
        return False
    if node.target._schema.is_mutable:  # the call that is replaced would stay, and write once more
        return False
    operands = [each for each in node.all_input_nodes if is_tensor(each) and value_of(each).ndim > 0]
    before = {each: _transposed(each) for each in operands}
    if not operands or None in before.values():
        return False
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda each: before.get(each, each))
    computed = call_like(nodes, node, node.target, args, kwargs)
    computed.meta["val"] = value_of(node).transpose(1, 2)  # whose dtype is autocast's
    _replace(nodes, node, computed)
    return True


def _slice(nodes: fx.Graph, node: fx.Node) -> bool:
    x = _transposed(node.args[0]) if node.target is aten.slice.Tensor else None
    if x is None or not _of_channels(node):
        return False
    given = arguments_of(node) | {"self": x, "dim": 2}
    _replace(nodes, node, call_like(nodes, node, node.target, tuple(given.values())))
    return True


def _split(nodes: fx.Graph, node: fx.Node) -> bool:
    x = _transposed(node.args[0]) if node.target in _PARTS else None
    if x is None or not _of_channels(node) or not all(map(is_item, node.users)):
        return False
    parts = call_like(nodes, node, node.target, (x, node.args[1], 2))
    for item in list(node.users):
        _replace(nodes, item, call_like(nodes, item, item.target, (parts, item.args[1])))
    return True


def _of_channels(node: fx.Node) -> bool:
    """Whether a cut is along the second axis: along the last, other passes look for it."""
    return arguments_of(node)["dim"] % 3 == 1


def _replace(nodes: fx.Graph, node: fx.Node, by: fx.Node) -> None:
    transposed = call_like(nodes, node, aten.transpose.int, (by, 1, 2))
    transposed.meta["val"] = value_of(node)  # outputs keep the strides that they had
    node.replace_all_uses_with(transposed)
