"""A function of rows, between the marks that a frontend set, becomes one node: passes follow its rows, not its ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

import packc.ops.row_wise  # noqa: F401  (the marks)
from packc.passes.graph import Graph, is_item, module_of, switches_mode
from packc.passes.normalize import carry_over_from_dynamo
from packc.passes.outlined import Outlined
from packc.passes.reasons import NotPackable

BEGIN = torch.ops.packc.begin_row_wise.default
_END = torch.ops.packc.end_row_wise.default


class RowWise(Outlined):
    """A function of rows, ``(*rows, *others) -> rows``."""

    name = "a function of rows"

    def __init__(self, body: fx.Graph, rows: int) -> None:
        super().__init__(body)
        self.rows = rows
        """How many of the arguments, the first ones, are rows."""


def row_wise(graph: Graph) -> Graph:
    """Put each stretch between marks into one node whose target is a :class:`RowWise`; no-op elsewhere.

    Raises:
        NotPackable: a stretch is cut in two, or what is inside is read outside.
    """
    nodes = graph.gm.graph
    for end in nodes.find_nodes(op="call_function", target=_END):
        _outline(nodes, end)
    if any(node.target in (BEGIN, _END) for node in nodes.nodes):
        raise NotPackable("a function of rows begins or ends beyond this graph")
    graph.gm.recompile()
    return graph


def without_marks(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph from Dynamo with its functions of rows on all rows: the same graph if there are none, else another."""
    if not any(node.target in (BEGIN, _END) for node in gm.graph.nodes):
        return gm
    graph, copies = fx.Graph(), dict[fx.Node, Any]()
    for node in gm.graph.nodes:
        if node.target is BEGIN:
            copies[node] = [copies[each] for each in node.args[0]]
        elif node.target is _END:
            copies[node] = copies[node.args[0]]
        elif is_item(node) and isinstance(copies[node.args[0]], list):
            copies[node] = copies[node.args[0]][node.args[1]]
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    unmarked = module_of(gm, graph)
    carry_over_from_dynamo(gm, unmarked)
    return unmarked


def writes_elsewhere(node: fx.Node) -> bool:
    """Whether a node writes to a value that others may hold; a function of rows may write to what it made itself."""
    if isinstance(node.target, RowWise):
        return any(_written(each).op == "placeholder" for each in node.target.body.nodes if _is_mutable(each))
    return _is_mutable(node)


def _is_mutable(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _written(node: fx.Node) -> fx.Node:
    """What is written to, or that of which it is a view."""
    written: Any = node.args[0]
    while isinstance(written.target, OpOverload) and written.target._schema.returns[0].alias_info is not None:
        written = written.args[0]
    return written


def _outline(graph: fx.Graph, end: fx.Node) -> None:
    result: fx.Node = end.args[0]  # type: ignore[assignment]
    made_from, begins = _made_from(result)
    if len(begins) != 1:
        raise NotPackable("a function of rows begins beyond this graph, or in another one")
    (begin,) = begins
    rows: list[fx.Node] = begin.args[0]  # type: ignore[assignment]
    inside, beside = _between(begin, end, made_from)
    body, others = _body(begin, inside, result)
    with graph.inserting_before(end):
        node = graph.call_function(RowWise(body, len(rows)), (*rows, *others))
    node.meta = dict(end.meta)
    end.replace_all_uses_with(node)
    graph.erase_node(end)
    for each in reversed([*inside, *beside]):  # what is beside reads what is inside, never the other way round
        _erase(graph, each)
    _erase(graph, begin)


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    if node.users:
        raise NotPackable(f"{next(iter(node.users)).target} reads what is inside a function of rows")
    graph.erase_node(node)


def _made_from(result: fx.Node) -> tuple[set[fx.Node], set[fx.Node]]:
    """What the result is made from, and the marks at which that begins."""
    found, begins, queue = set[fx.Node](), set[fx.Node](), [result]
    while queue:
        node = queue.pop()
        if node.target is BEGIN:
            begins.add(node)
        elif node not in found:
            found.add(node)
            queue.extend(node.all_input_nodes)
    return found, begins


def _between(begin: fx.Node, end: fx.Node, made_from: set[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """What leads from one mark to the other, and what is made of rows beside it: assertions on their number."""
    of_rows, inside, beside = {begin}, list[fx.Node](), list[fx.Node]()
    node = begin.next
    while node is not end:
        if switches_mode(node):
            raise NotPackable("grad mode or autocast changes inside a function of rows")
        if not of_rows.isdisjoint(node.all_input_nodes):
            of_rows.add(node)
            (inside if node in made_from else beside).append(node)
        node = node.next
    return inside, beside


def _body(begin: fx.Node, inside: list[fx.Node], result: fx.Node) -> tuple[fx.Graph, list[fx.Node]]:
    """The graph of what is inside, and what it reads besides rows."""
    body, of_rows = fx.Graph(), {begin, *inside}
    others = list(dict.fromkeys(each for node in inside for each in node.all_input_nodes if each not in of_rows))
    rows = [body.placeholder(f"rows_{i}") for i in range(len(begin.args[0]))]  # type: ignore[arg-type]
    copies = {other: body.placeholder(other.name) for other in others}
    for node in inside:
        item = node.args[1] if begin in node.all_input_nodes else None
        copies[node] = body.node_copy(node, copies.__getitem__) if item is None else rows[item]  # type: ignore[index]
    body.output(copies[result])
    return body, others
