"""Which values of the padded graph are known to be zero at padding.

Models mask by multiplying, and what was multiplied stays zero through every op with f(0) = 0 that keeps tokens apart.
Packing leaves padding out; wherever an op would have read it, these values are the proof that it read zeros.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import fx

from packc.passes.axes import value_of
from packc.passes.graph import Graph, is_item
from packc.passes.opposites import Opposites
from packc.passes.rules import zero_rule_for
from packc.passes.rules.registry import first_is_zero

aten = torch.ops.aten

_IS_ZERO = {aten.eq.Scalar}
_TRUE_AT_ONE = ((aten.ne.Scalar, 0), (aten.gt.Scalar, 0), (aten.eq.Scalar, 1))
_FALSE_AT_ZERO: dict[Any, Callable[[Any], bool]] = {
    aten.ne.Scalar: lambda bound: bound == 0,
    aten.eq.Scalar: lambda bound: bound != 0,
    aten.gt.Scalar: lambda bound: bound >= 0,
    aten.ge.Scalar: lambda bound: bound > 0,
}
_ZEROS = {aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default}
_FILLED = {
    aten.full.default: 1,
    aten.full_like.default: 1,
    aten.new_full.default: 2,
    aten.scalar_tensor.default: 0,
    aten.fill.Scalar: 1,
    aten.fill.Tensor: 1,
}
_NOT = {aten.logical_not.default, aten.bitwise_not.default}


def zeros(graph: Graph) -> Graph:
    """Find the values that are zero wherever the graph's mask is, or is before the first token of a row."""
    if not graph.padding:
        return graph
    zero = zero_at_padding(graph, graph.mask)
    return replace(graph, zero=zero, zero_before=_zero_before_tokens(graph, zero))


def zero_at_padding(graph: Graph, mask: fx.Node) -> set[fx.Node]:
    """Values with token axes that are zero wherever ``mask`` is, whatever the inputs are (short of inf and NaN)."""
    zero = {mask}
    one: set[fx.Node] = set()  # true exactly where the mask is zero: its negation
    for node in _calls(graph):
        if _is_negation(node, one, mask):
            one.add(node)
        elif _is_zero(node, zero, one):
            zero.add(node)
    return zero


def _zero_before_tokens(graph: Graph, zero: set[fx.Node]) -> set[fx.Node]:
    """Values that are zero at padding before a row's first token: a mixer has met nothing but zeros there."""
    zero = set(zero)
    for node in graph.gm.graph.nodes:
        reading = graph.tokens.readings.get(node)
        if reading is not None and reading.is_mixer:
            found = any(operand in zero for operand in reading.zero_from)
        elif is_item(node) and (reading := graph.tokens.readings.get(node.args[0])) is not None and reading.is_mixer:
            found = node.args[1] == 0 and node.args[0] in zero
        else:
            found = node.op == "call_function" and graph.tokens.has_axes(node) and _is_zero(node, zero, set())
        if found:
            zero.add(node)
    return zero


def zero_at_tokens(graph: Graph, mask: fx.Node) -> set[fx.Node]:
    """Values that are zero wherever ``mask`` is one: a mask that sets these to zero marks padding, not tokens."""
    # Of other inputs, ids among them, zero and one say no more than other numbers: those are not tried.
    tried = Opposites(graph, mask) if mask is graph.mask else None
    zero: set[fx.Node] = set()
    for node in _calls(graph):
        if _is_opposite(node, mask) or _is_zero(node, zero, set()) or (tried and _is_hidden(node, tried)):
            zero.add(node)
    return zero


def _is_hidden(node: fx.Node, tried: Opposites) -> bool:
    """Whether a value is made of the mask and zero at tokens, or filled with zeros there."""
    args = cast("tuple[Any, ...]", node.args)
    if node.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        return args[1] in tried.true and is_constant_zero(args[2])
    if node.target in (aten.where.self, aten.where.ScalarSelf):
        return args[0] in tried.true and is_constant_zero(args[1])
    return node in tried.zero


def _calls(graph: Graph) -> Iterator[fx.Node]:
    """A value without a layout may have been shifted along the sequence: what was zero is zero elsewhere now."""
    return (node for node in graph.gm.graph.nodes if node.op == "call_function" and graph.tokens.has_axes(node))


def keeps_zero(node: fx.Node) -> bool:
    """Whether a value is zero where the first operand is, and made of nothing else."""
    return zero_rule_for(node.target) is first_is_zero


def _is_opposite(node: fx.Node, mask: fx.Node) -> bool:
    """The negation of a mask, or a value that is filled with zeros where it is one."""
    args = cast("tuple[Any, ...]", node.args)
    if node.target is aten.rsub.Scalar:
        return args[1] == 1 and _is_mask_itself(args[0], mask)
    if node.target is aten.masked_fill.Scalar:
        return args[2] == 0 and _is_true_at_tokens(args[1], mask)
    if node.target is aten.where.ScalarSelf:
        return args[1] == 0 and _is_true_at_tokens(args[0], mask)
    return _is_negation(node, set(), mask)


def _is_true_at_tokens(node: object, mask: fx.Node) -> bool:
    while isinstance(node, fx.Node) and node is not mask:
        compared = (node.target, node.args[1]) if len(node.args) > 1 else None
        if not keeps_zero(node) and compared not in _TRUE_AT_ONE:
            return False
        node = cast("Any", node.args[0])
    return node is mask


def _is_zero(node: fx.Node, zero: set[fx.Node], one: set[fx.Node]) -> bool:
    target, args = node.target, cast("tuple[Any, ...]", node.args)
    rule = zero_rule_for(target)
    if rule is not None:
        return rule(args, zero.__contains__)
    if target is aten.masked_fill.Scalar:
        return args[1] in one and args[2] == 0
    if target is aten.where.ScalarOther:
        return args[0] in zero and args[2] == 0
    if target is aten.where.self:
        return args[0] in zero and (args[2] in zero or is_constant_zero(args[2]))
    if target in _FALSE_AT_ZERO:
        return args[0] in zero and _FALSE_AT_ZERO[target](args[1])
    return False


def is_constant_zero(node: object) -> bool:
    """Zero, or made of zeros by ops that make no other numbers of them."""
    while isinstance(node, fx.Node):
        args = cast("tuple[Any, ...]", node.args)
        rule = zero_rule_for(node.target)
        if node.target in _ZEROS:
            return True
        if node.target in _FILLED:
            node = args[_FILLED[node.target]]
        elif rule is not None and args and rule(args, partial(operator.is_, args[0])):
            node = args[0]
        else:
            return False
    return bool(node == 0)


def is_masked(value: fx.Node) -> fx.Node | None:
    """What sets parts of a value to zero by being true or false; None if nothing is seen to."""
    node: Any = value
    while isinstance(node, fx.Node) and node.op == "call_function":
        args = cast("tuple[Any, ...]", node.args)
        if node.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
            return args[1]
        if node.target in (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf):
            return args[0]
        if node.target is aten.mul.Tensor:
            truth = next((arg for arg in args[:2] if isinstance(arg, fx.Node) and _is_truth(arg)), None)
            if truth is not None:
                return truth
        elif not keeps_zero(node):
            return None
        node = args[0]
    return None


def _is_truth(node: Any) -> bool:
    """Whether a value is false or true, whatever numbers those were made."""
    while isinstance(node, fx.Node):
        if getattr(value_of(node), "dtype", None) == torch.bool:  # several results have none
            return True
        if node.op != "call_function" or not keeps_zero(node):
            return False
        node = node.args[0]
    return False


def _is_negation(node: fx.Node, one: set[fx.Node], mask: fx.Node) -> bool:
    args = cast("tuple[Any, ...]", node.args)
    if node.target in _IS_ZERO:
        return args[1] == 0 and _is_mask_itself(args[0], mask)
    if node.target in _NOT:
        return _is_mask_itself(args[0], mask) and value_of(args[0]).dtype == torch.bool
    return keeps_zero(node) and bool(args) and args[0] in one and value_of(node).dtype == torch.bool


def _is_mask_itself(node: object, mask: fx.Node) -> bool:
    """The mask or a rearrangement of it: zero there means padding, and only there."""
    while isinstance(node, fx.Node) and node is not mask and keeps_zero(node):
        node = node.args[0]
    return node is mask
