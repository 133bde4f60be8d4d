"""Attention that is written out, and more than the fused op computes: with capped scores, with sinks or with biases.

    softmax(tanh(q @ k^T * scale / cap) * cap + mask) @ v
    softmax(cat([q @ k^T * scale + mask, sinks], -1))[..., :-1] @ v
    softmax(q @ k^T * scale + biases + mask) @ v

It becomes one node, which runs as it is written, on padded rows, or packed where ``varlen_attention`` computes the same
(``varlen_form.py``). What passes must know of it is what makes it attention: each query's scores are made of that query
and one key at a time, then the mask is added, and what follows up to the product with the values keeps the scores that
the mask hides below all others.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from packc.passes.axes import is_tensor, same_size, value_of
from packc.passes.graph import Graph, is_item
from packc.passes.outlined import Outlined
from packc.passes.written_out_attention import SOFTMAX, is_cast, is_scaled

aten = torch.ops.aten

DROPS = {aten.dropout.default}
_LARGEST = {aten.amax.default, aten.max.dim}


class AsWritten(Outlined):
    """``(q, transposed keys, v, mask, *others) -> out``: all of ``(B, heads, ., .)``."""

    name = "attention as it is written"


def biases_of(node: fx.Node) -> tuple[Any, ...]:
    """What is added to scores beside the mask, and what is joined to them; nothing of other nodes."""
    return node.args[4:] if isinstance(node.target, AsWritten) else ()


class _Scores(NamedTuple):
    product: fx.Node
    """``q @ k^T``."""
    mask: Any
    sinks: list[Any]
    """Columns that follow the keys'."""


def attention_as_written(graph: Graph) -> Graph:
    """Put each into one node whose target is an :class:`AsWritten`; no-op elsewhere."""
    nodes, changed = graph.gm.graph, False
    for node in list(nodes.nodes):
        if node.target not in SOFTMAX or node.args[1] not in (-1, 3):
            continue
        scores = _scores(node.args[0])
        out = _product(node, scores.sinks) if scores is not None else None
        if scores is not None and out is not None:
            changed |= _outline(nodes, scores, out)
    if changed:
        nodes.eliminate_dead_code()
        graph.gm.recompile()
    return graph


def _scores(node: Any) -> _Scores | None:
    """What is under a softmax, back to ``q @ k^T``: after the mask nothing that moves scores apart, before it nothing
    that looks at several."""
    mask, sinks = None, list[Any]()
    while is_tensor(node) and node.op == "call_function":
        args = node.args
        if node.target is aten.matmul.default:
            is_product = value_of(node).ndim == 4 and all(value_of(each).ndim == 4 for each in args)
            return _Scores(node, mask, sinks) if is_product and mask is not None else None
        if mask is None and (joined := _with_sinks(node)) is not None:
            if sinks:
                return None
            node, *sinks = joined
            continue
        if mask is None and node.target is aten.add.Tensor and is_tensor(args[1]) and not node.kwargs:
            if not value_of(args[1]).is_floating_point():
                return None  # truths that are added to scores hide nothing
            mask = args[1]
        elif not (
            is_cast(node)
            or (mask is None and subtracts_largest(node))
            or (mask is not None and (node.target is aten.tanh.default or is_scaled(node) or _adds_biases(node)))
        ):
            return None
        node = args[0]
    return None


def _adds_biases(node: fx.Node) -> bool:
    """One for each query and key, ``(B or 1, heads or 1, queries or 1, keys)``."""
    return node.target is aten.add.Tensor and is_tensor(node.args[1]) and value_of(node.args[1]).ndim == 4


def _with_sinks(node: fx.Node) -> Any:
    """The scores that sinks are joined to, and those."""
    if node.target is not aten.cat.default or len(node.args[0]) != 2 or node.args[1:] not in ((-1,), (3,)):  # type: ignore[arg-type]
        return None
    return node.args[0]


def subtracts_largest(node: fx.Node) -> bool:
    """``x - max(x)``, query by query."""
    if node.target is not aten.sub.Tensor or node.kwargs or not is_tensor(node.args[1]):
        return False
    largest: Any = node.args[1]
    if is_item(largest) and largest.args[1] == 0:
        largest = largest.args[0]
    dims = largest.args[1:] if largest.op == "call_function" else ()
    return largest.target in _LARGEST and largest.args[0] is node.args[0] and dims in ((-1, True), ([-1], True))


def _product(node: fx.Node, sinks: list[Any]) -> fx.Node | None:
    """``probabilities @ v``, with the sinks' dropped."""
    with_sinks = bool(sinks)
    while True:
        user = next(iter(node.users), None)
        if user is None or len(node.users) > 1 or user.args[0] is not node:
            return None
        if user.target is aten.matmul.default:
            return user if not with_sinks and value_of(user.args[1]).ndim == 4 else None
        if user.target is aten.slice.Tensor and with_sinks:
            if user.args[1] not in (-1, 3) or user.args[2] not in (0, None) or len(user.args) > 4:
                return None
            full, kept = value_of(node).shape[3], value_of(user).shape[3]
            if not same_size(full - kept, value_of(sinks[0]).shape[3]):
                return None
            with_sinks = False
        elif user.target not in DROPS and not is_cast(user):
            return None
        node = user


def _outline(graph: fx.Graph, scores: _Scores, out: fx.Node) -> bool:
    """False if something else reads what is inside, or the mask or the sinks are made of it."""
    inside = _between(scores.product, out)
    if any(each is not out and not inside.issuperset(each.users) for each in inside):
        return False
    q, transposed = scores.product.args
    given = [q, transposed, out.args[1], scores.mask]
    if not inside.isdisjoint([*given, *scores.sinks]):
        return False
    ordered = [node for node in graph.nodes if node in inside]
    given += dict.fromkeys(
        each for node in ordered for each in node.all_input_nodes if each not in inside and each not in given
    )
    body = fx.Graph()
    copies = {each: body.placeholder(each.name) for each in given}
    for node in ordered:
        copies[node] = body.node_copy(node, copies.__getitem__)
    body.output(copies[out])
    with graph.inserting_before(out):
        node = graph.call_function(AsWritten(body), tuple(given))
    node.meta = dict(out.meta)
    out.replace_all_uses_with(node)
    for each in reversed(ordered):
        graph.erase_node(each)
    return True


def _between(first: fx.Node, last: fx.Node) -> set[fx.Node]:
    """Both, and what lies on a way from one to the other."""
    after, node = {first}, first
    while node is not last:
        node = node.next
        if not after.isdisjoint(node.all_input_nodes):
            after.add(node)
    inside, queue = set[fx.Node](), [last]
    while queue:
        node = queue.pop()
        if node in after and node not in inside:
            inside.add(node)
            queue.extend(node.all_input_nodes)
    return inside
