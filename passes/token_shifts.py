"""Shifts along the tokens become convolutions of packc's, which are told where documents begin.

Each token gets the value of the one that is some places before it, however a model writes that:

    cat([first, x[:, :-1]], dim=1)
    pad(x, (0, 0, 1, 0))[:, :-1], or pad(x, (0, 0, 1, -1))
    y = roll(x, 1, dims=1); y[:, 0] = 0

``first`` is what stands in front of a row: zero, or the same for every row. In a packed row it stands in front of every
document. Layouts alone say which axis is the sequence: values are followed here as in :mod:`packc.passes.layout`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from packc.passes.arguments import argument, arguments_of
from packc.passes.axes import BATCH, SEQ, Layout, inputs_of, is_tensor, same_size, value_of
from packc.passes.graph import Graph, call_like
from packc.passes.layout import begin, inputs_of_size, label
from packc.passes.shifted import shifted
from packc.passes.sources import is_argument
from packc.passes.zeros import is_constant_zero

aten = torch.ops.aten
_PADS = {aten.pad.default, aten.constant_pad_nd.default}
_CATS = {aten.cat.default, aten.concat.default, aten.concatenate.default}
_COPIES = {aten.alias.default, aten.contiguous.default, aten.clone.default}


class _Shift(NamedTuple):
    x: fx.Node
    dim: int
    by: int
    first: fx.Node | None = None
    """What stands in front of every row, to be broadcast to ``x``; None: zero."""
    of_zeros: bool = False
    """Whether ``x`` is a linear layer with a bias, and what stands in front the same layer of zeros."""


def token_shifts(graph: Graph) -> Graph:
    """Replace every shift along the sequence; no-op elsewhere."""
    nodes = graph.gm.graph
    found = {node: shift for node in nodes.nodes if (shift := _shift_of(node)) is not None}
    if not found:
        return graph
    tokens = begin(graph, inputs_of_size(graph))
    for node in list(nodes.nodes):
        shift = found.get(node)
        layout = tokens.layout(shift.x) if shift is not None else None
        if shift is None or layout is None or not _is_along_tokens(shift, layout):
            label(node, tokens, *graph.sizes)
            continue
        last = node.prev
        with nodes.inserting_before(node):
            written = _written(nodes, node, shift, layout)
        while (last := last.next) is not node:
            label(last, tokens, *graph.sizes)
        node.replace_all_uses_with(written)
    nodes.eliminate_dead_code()
    graph.gm.recompile()
    return graph


def _is_along_tokens(shift: _Shift, layout: Layout) -> bool:
    features = [size for axis, size in zip(layout, value_of(shift.x).shape, strict=True) if axis not in (BATCH, SEQ)]
    known = all(isinstance(size, int) for size in features)
    return known and BATCH in layout and layout[shift.dim] is SEQ and (shift.first is None or layout[0] is BATCH)


# ---- what a node shifts, along some axis -----------------------------------------------------------------------------


def _shift_of(node: fx.Node) -> _Shift | None:
    if node.op != "call_function" or not is_tensor(node) or not value_of(node).is_floating_point():
        return None
    read = {aten.slice.Tensor: _cut, aten.select_scatter.default: _rolled, aten.slice_scatter.default: _rolled}
    read |= dict.fromkeys(_PADS, _padded) | dict.fromkeys(_CATS, _joined)
    shift = read[node.target](node) if node.target in read else None
    as_long = shift is not None and all(map(same_size, value_of(node).shape, value_of(shift.x).shape))
    return shift if as_long else None


def _padded(node: fx.Node) -> _Shift | None:
    """``pad(x, (0, 0, 1, -1))``"""
    dim, front, back = _zeros_around(node) or (0, 0, 0)
    x = _same(node.args[0])
    return _Shift(x, dim, front) if isinstance(front, int) and front > 0 and back == -front else None


def _cut(node: fx.Node) -> _Shift | None:
    """``pad(x, (0, 0, 1, 0))[:, :-1]``, from a later position on a shorter shift; ``cat([first, x], 1)[:, :-1]``"""
    longer, start = _same(node.args[0]), argument(node, "start") or 0
    dim = argument(node, "dim") % value_of(longer).ndim
    if argument(node, "step") != 1 or not isinstance(start, int):
        return None
    if longer.target in _PADS:
        padded, front, back = _zeros_around(longer) or (None, 0, 0)
        by = front - start if isinstance(front, int) else -1
        return (
            _Shift(_same(longer.args[0]), dim, by) if padded == dim and back == 0 and start >= 0 and by >= 0 else None
        )
    if longer.target in _CATS and start == 0 and argument(longer, "dim") % value_of(longer).ndim == dim:
        return _behind(argument(longer, "tensors"), dim)
    return None


def _joined(node: fx.Node) -> _Shift | None:
    """``cat([first, x[:, :-1]], 1)``"""
    dim, parts = argument(node, "dim") % value_of(node).ndim, argument(node, "tensors")
    part = _same(parts[-1])
    if part.target is not aten.slice.Tensor or argument(part, "step") != 1:
        return None
    if argument(part, "dim") % value_of(part).ndim != dim or argument(part, "start") not in (None, 0):
        return None
    return _behind([*parts[:-1], part.args[0]], dim)


def _rolled(node: fx.Node) -> _Shift | None:
    """``y = roll(x, 1, dims=1); y[:, 0] = 0``"""
    rolled, dim = _same(node.args[0]), argument(node, "dim") % value_of(node).ndim
    if rolled.target is not aten.roll.default or not is_constant_zero(argument(node, "src")):
        return None
    by, dims = argument(rolled, "shifts"), argument(rolled, "dims")
    if [each % value_of(node).ndim for each in dims] != [dim] or not isinstance(by[0], int) or by[0] < 1:
        return None
    if node.target is aten.select_scatter.default:
        in_front = by[0] == 1 and argument(node, "index") == 0
    else:
        in_front = [argument(node, each) for each in ("start", "end", "step")] in ([None, by[0], 1], [0, by[0], 1])
    return _Shift(_same(rolled.args[0]), dim, by[0]) if in_front else None


def _behind(parts: list[fx.Node], dim: int) -> _Shift | None:
    """The second of two parts behind the first, if that is the same in every row."""
    if len(parts) != 2 or value_of(parts[0]).dtype != value_of(parts[1]).dtype:
        return None
    first, x = parts[0], _same(parts[1])
    by = value_of(first).shape[dim]
    if isinstance(by, int) and is_constant_zero(first):
        return _Shift(x, dim, by)
    if not same_size(by, 1) or dim != 1:
        return None
    if first.target is x.target is aten.linear.default and first.args[1:] == x.args[1:]:
        return _Shift(x, dim, 1, of_zeros=True) if is_constant_zero(first.args[0]) else None
    return _Shift(x, dim, 1, first=first.args[0]) if _is_for_all_rows(first) else None  # type: ignore[arg-type]


def _is_for_all_rows(first: fx.Node) -> bool:
    """Whether ``(B, 1, ...)`` is one ``(1, 1, ...)``, or ``(...)``, expanded: of parameters alone, for what is made of
    arguments may be a row's, where there is but one."""
    if first.target is not aten.expand.default or any(map(is_argument, inputs_of(first.args[0]))):  # type: ignore[arg-type]
        return False
    sizes = value_of(first.args[0]).shape
    return len(sizes) < value_of(first).ndim or same_size(sizes[0], 1)


def _zeros_around(node: fx.Node) -> tuple[int, Any, Any] | None:
    """The axis that alone is padded, with zeros, and how far in front and behind."""
    given = arguments_of(node)
    if given.get("mode", "constant") != "constant" or given["value"] not in (None, 0):
        return None
    pads, last = list(given["pad"]), value_of(node).ndim - 1
    around = [(last - n // 2, *pads[n : n + 2]) for n in range(0, len(pads), 2) if pads[n : n + 2] != [0, 0]]
    return around[0] if len(around) == 1 else None


def _same(node: Any) -> Any:
    """What a node is a copy of."""
    while node.target in _COPIES:
        node = node.args[0]
    return node


# ---- the same on tokens ----------------------------------------------------------------------------------------------


def _written(nodes: fx.Graph, node: fx.Node, shift: _Shift, layout: Layout) -> fx.Node:
    def call(target: Any, *args: Any) -> fx.Node:
        return call_like(nodes, node, target, args)

    x = shift.x
    if shift.by == 0:
        return x
    if shift.of_zeros:
        x = call(aten.linear.default, *shift.x.args[:2])
        x.meta["val"] = value_of(shift.x)  # whose dtype is autocast's
    order = [layout.index(BATCH), layout.index(SEQ)]
    order += [axis for axis in range(len(layout)) if axis not in order]
    in_order = order == list(range(len(order)))
    tokens = x if in_order else call(aten.permute.default, x, order)
    features = list(value_of(tokens).shape[2:])
    if len(features) != 1:
        tokens = call(aten.flatten.using_ints, tokens, 2) if features else call(aten.unsqueeze.default, tokens, 2)
    moved = shifted(nodes, node, tokens, shift.by)
    if shift.first is not None:
        is_not_first = shifted(nodes, node, call(aten.ones_like.default, call(aten.slice.Tensor, tokens, 2, 0, 1)), 1)
        moved, is_first = (
            _split(call, moved, features),
            _split(call, call(aten.eq.Scalar, is_not_first, 0), [1] * len(features)),
        )
        return call(aten.where.self, is_first, shift.first, moved)
    moved = _split(call, moved, features)
    if not in_order:
        moved = call(aten.permute.default, moved, [order.index(axis) for axis in range(len(order))])
    if shift.of_zeros:
        bias, dtype = shift.x.args[2], value_of(moved).dtype
        bias = bias if value_of(bias).dtype == dtype else call(aten.to.dtype, bias, dtype)
        return call(aten.add.Tensor, moved, bias)
    return moved


def _split(call: Any, flat: fx.Node, features: list[int]) -> fx.Node:
    """``(B, L, D)`` with the axes that were flattened."""
    if len(features) == 1:
        return flat
    return call(aten.unflatten.int, flat, 2, features) if features else call(aten.squeeze.dim, flat, 2)
