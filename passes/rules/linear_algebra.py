"""Products: legal when they contract features only and both operands keep their own token axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from packc.passes.axes import FLAT, OTHER, SEQ, Axis, Layout, covers_tokens, same_size, show, value_of
from packc.passes.reading import Call, NotTokenwise, Reading
from packc.passes.rules.registry import Op, either_is_zero, register_rule

aten = torch.ops.aten


def _first_without_bias(args: tuple[Any, ...], is_zero: Callable[[Any], bool]) -> bool:
    return is_zero(args[0]) and (len(args) < 3 or args[2] is None)


@register_rule(aten.linear.default, zero=_first_without_bias)
def linear(op: Op) -> Reading:
    """x (..., D) @ weight (E, D)^T + bias (E,)."""
    x = op.args[0]
    op.only_labelled(x)
    layout = op.layout(x)
    if layout is None or layout[-1] is not OTHER:
        raise NotTokenwise(f"contracts the last axis of {show(layout)}")
    return Reading(layout, {x: layout})


@register_rule(aten.mm.default, aten.matmul.default, aten.bmm.default, zero=either_is_zero)
def matmul(op: Op) -> Reading:
    """a (..., M, K) @ b (..., K, N), leading axes broadcast: one is a weight, or both have the same tokens."""
    reading = _product(op, *op.args[:2])
    weight, x = op.args[:2]
    if value_of(weight).ndim == 2 and x in reading.operands and reading.operands[x][-2:] == (OTHER, SEQ):
        # Channels first: the op itself would copy its result to lie so, which what reads it token by token undoes.
        tokens_first = Call(aten.linear.default, (_transposed(x), weight), {})
        reading.call = _transposed(tokens_first)
    return reading


def _transposed(x: fx.Node | Call) -> Call:
    return Call(aten.transpose.int, (x, -2, -1), {})


@register_rule(aten.baddbmm.default)
def baddbmm(op: Op) -> Reading:
    """added (N or 1, M or 1, K) + a (N, M, K) @ b (N, K, P), with nothing added that varies from token to token."""
    added, a, b = op.args[:3]
    reading = _product(op, a, b)
    op.only_labelled(a, b)
    for kind, size in zip(reading.results, value_of(added).shape, strict=True):  # type: ignore[arg-type]
        if kind is not OTHER and not same_size(size, 1):
            raise NotTokenwise(f"adds {added.name}, which varies along tokens")
    return reading


def _product(op: Op, a: fx.Node, b: fx.Node) -> Reading:
    la, lb = _layout_or_other(op, a), _layout_or_other(op, b)
    if len(la) < 2 or len(lb) < 2:
        return _times_vector(a, b, la, lb)
    if la[-1] is not OTHER or lb[-2] is not OTHER:
        raise NotTokenwise(f"contracts a token axis: {show(la)} @ {show(lb)}")
    if covers_tokens(la) and covers_tokens(lb):
        if la[:-2] != lb[:-2] or (la[-2], lb[-1]) != (OTHER, OTHER):
            raise NotTokenwise(f"multiplies tokens with tokens: {show(la)} @ {show(lb)}")
        return Reading(la, {a: la, b: lb})
    tokens, weight = (a, b) if covers_tokens(la) else (b, a)
    layout = la if tokens is a else lb
    needs = {tokens: layout} | _along_tokens(weight, value_of(tokens).shape, layout)
    return Reading((*la[:-1], OTHER) if tokens is a else (*lb[:-2], OTHER, lb[-1]), needs)


def _along_tokens(weight: fx.Node, shape: Any, layout: Layout) -> dict[fx.Node, Layout]:
    """A weight that is not the same for all tokens, and how it lies along those that it is multiplied with."""
    sizes = value_of(weight).shape
    leading = len(sizes) - 2
    if len(sizes) > len(shape):
        raise NotTokenwise(f"operand {weight.name} {tuple(sizes)} has more axes than the tokens")
    kinds, of_tokens = layout[-2 - leading : -2], shape[-2 - leading : -2]
    varies = [kind is not OTHER and not same_size(size, 1) for kind, size in zip(kinds, sizes, strict=False)]
    if not any(varies):
        return {}
    same = all(same_size(size, n) for size, n, differs in zip(sizes, of_tokens, varies, strict=False) if differs)
    if not same or FLAT in kinds or not covers_tokens(kinds):
        raise NotTokenwise(f"operand {weight.name} {tuple(sizes)} varies along leading axes")
    return {weight: (*kinds, OTHER, OTHER)}


def _times_vector(a: fx.Node, b: fx.Node, la: Layout, lb: Layout) -> Reading:
    if len(lb) == 1 and covers_tokens(la) and la[-1] is OTHER:
        return Reading(la[:-1], {a: la})
    if len(la) == 1 and covers_tokens(lb) and lb[-2] is OTHER:
        return Reading((*lb[:-2], lb[-1]), {b: lb})
    raise NotTokenwise(f"multiplies {show(la)} @ {show(lb)}")


def _layout_or_other(op: Op, operand: fx.Node) -> Layout:
    return op.layout(operand) or (OTHER,) * value_of(operand).ndim


@register_rule(aten.addmm.default)
def addmm(op: Op) -> Reading:
    """bias + x (tokens, D) @ weight (D, E)."""
    _, x, _ = op.args[:3]
    op.only_labelled(x)
    layout = op.layout(x)
    if layout is None or layout[1] is not OTHER:
        raise NotTokenwise(f"contracts the last axis of {show(layout)}")
    bias = value_of(op.args[0])
    if bias.ndim == 2 and bias.shape[0] != 1:
        raise NotTokenwise("the added matrix varies from token to token")
    return Reading(layout, {x: layout})


@register_rule(aten.tensordot.default, aten.inner.default, zero=either_is_zero)
def tensordot(op: Op) -> Reading:
    """Axes of the one summed against axes of the other, what is left of both side by side: one is a weight."""
    a, b = op.args[:2]
    la, lb = _layout_or_other(op, a), _layout_or_other(op, b)
    dims = [[-1], [-1]] if op.target is aten.inner.default else op.args[2:4]
    summed = [[op.dim(dim, len(layout)) for dim in each] for each, layout in zip(dims, (la, lb), strict=True)]
    if covers_tokens(la) and covers_tokens(lb):
        raise NotTokenwise(f"multiplies tokens with tokens: {show(la)} @ {show(lb)}")
    if any(layout[dim] is not OTHER for layout, each in zip((la, lb), summed, strict=True) for dim in each):
        raise NotTokenwise(f"contracts a token axis: {show(la)} @ {show(lb)}")
    left = [
        kind for layout, each in zip((la, lb), summed, strict=True) for n, kind in enumerate(layout) if n not in each
    ]
    return Reading(tuple(left), {a: la} if covers_tokens(la) else {b: lb})


@register_rule(aten.einsum.default, zero=lambda args, is_zero: any(map(is_zero, args[1])))
def einsum(op: Op) -> Reading:
    """Every letter that names a token axis must survive, and name the same axis in all operands."""
    equation, operands = op.args[:2]
    if op.args[2] is not None:
        raise NotTokenwise(f"einsum {equation!r} in an order of its own")
    inputs, output = _written_out(equation, [value_of(operand).ndim for operand in operands])
    kinds: dict[str, Axis] = {}
    for letters, operand in zip(inputs, operands, strict=True):
        for letter, kind in zip(letters, op.layout(operand) or (), strict=False):
            if kind is not OTHER and kinds.setdefault(letter, kind) is not kind:
                raise NotTokenwise(f"einsum {equation!r}: axis {letter} is both {kinds[letter].value} and {kind.value}")
    if len(set(kinds.values())) < len(kinds):
        raise NotTokenwise(f"einsum {equation!r} multiplies tokens with tokens")
    if not set(kinds) <= set(output):
        raise NotTokenwise(f"einsum {equation!r} sums over a token axis")
    needs = {}
    for letters, operand in zip(inputs, operands, strict=True):
        spans = tuple(kinds.get(letter, OTHER) for letter in letters)
        if covers_tokens(op.layout(operand)) and spans == op.layout(operand):
            needs[operand] = spans
        elif any(kind is not OTHER for kind in spans):
            raise NotTokenwise(f"einsum {equation!r}: operand {operand.name} {show(op.layout(operand))}")
    return Reading(tuple(kinds.get(letter, OTHER) for letter in output), needs)


def _written_out(equation: str, ranks: list[int]) -> tuple[list[str], str]:
    """A letter for every axis: of each operand, and of the result. Those of an ellipsis are digits, from the last."""
    given, arrow, output = equation.replace(" ", "").partition("->")
    inputs = given.split(",")
    hidden = [
        rank - len(each.replace("...", "")) if "..." in each else 0 for each, rank in zip(inputs, ranks, strict=True)
    ]
    digits = "9876543210"
    if not arrow:
        letters = given.replace("...", "").replace(",", "")
        output = "..." + "".join(sorted(each for each in set(letters) if letters.count(each) == 1))
    inputs = [each.replace("...", digits[len(digits) - n :]) for each, n in zip(inputs, hidden, strict=True)]
    return inputs, output.replace("...", digits[len(digits) - max(hidden) :])
