"""What a rule is: a function from a node of the padded graph to its reading."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from packc.passes.arguments import arguments_of
from packc.passes.attention_as_written import AsWritten
from packc.passes.axes import Axis, Layout, covers_tokens, is_tensor, same_size, show, value_of
from packc.passes.graph import Tokens
from packc.passes.reading import Call, NotTokenwise, Reading
from packc.passes.row_wise import RowWise


class Op:
    """A node of the padded graph, as rules ask about it."""

    def __init__(self, node: fx.Node, tokens: Tokens, batch: Any, length: Any) -> None:
        self.node = node
        self.batch, self.length = batch, length
        self.target: OpOverload = node.target  # type: ignore[assignment]
        self.layout = tokens.layout
        self.padding = tokens.padding
        self._named = arguments_of(node)
        self.args = tuple(self._named.values()) if isinstance(self.target, OpOverload) else node.args
        """All, in the order of the schema: rules never ask where a caller wrote one."""

    def argument(self, name: str, default: Any = None) -> Any:
        """An argument by its name in the schema; ``default`` if the op has none of this name."""
        return self._named.get(name, default)

    def with_args(self, **changed: Any) -> Call:
        """The op itself with the named arguments replaced."""
        args, kwargs = [], {}
        for argument, value in zip(self.target._schema.arguments, self.args, strict=True):
            value = changed.get(argument.name, value)
            if argument.kwarg_only:
                kwargs[argument.name] = value
            else:
                args.append(value)
        return Call(self.target, tuple(args), kwargs)

    def tensors(self) -> list[fx.Node]:
        """Every tensor operand, lists flattened, in order."""
        found: list[fx.Node] = []
        fx.map_arg((self.node.args, self.node.kwargs), lambda n: found.append(n) if is_tensor(n) else None)
        return found

    def only_labelled(self, *allowed: Any) -> None:
        """Refuse an op one of whose other operands (a weight, an index) has token axes."""
        for operand in self.tensors():
            if operand not in allowed and covers_tokens(self.layout(operand)):
                raise NotTokenwise(f"operand {operand.name} {show(self.layout(operand))} varies from token to token")

    @staticmethod
    def dim(dim: int, rank: int) -> int:
        """A dimension counted from the front."""
        return dim % max(rank, 1)

    def refuse_token_axes(self, dims: list[int], layout: Layout) -> None:
        for dim in dims:
            if layout[dim] is not Axis.OTHER:
                raise NotTokenwise(f"works along axis {dim} of {show(layout)}")


Rule = Callable[[Op], Reading]
RULES: dict[OpOverload, Rule] = {}

ZeroRule = Callable[[tuple[Any, ...], Callable[[Any], bool]], bool]
"""(arguments, which values are zero at padding) -> whether the op's result is zero there too."""
_ZERO_RULES: dict[OpOverload, ZeroRule] = {}


def register_rule(*overloads: OpOverload, zero: ZeroRule | None = None) -> Callable[[Rule], Rule]:
    """Make a function the rule of these ops; ``zero`` says when they give zero, where that is known."""

    def register(rule: Rule) -> Rule:
        for overload in overloads:
            assert overload not in RULES, f"two rules for {overload}"
            RULES[overload] = rule
        return rule

    if zero is not None:
        register_zero(zero, *overloads)
    return register


def register_zero(rule: ZeroRule, *overloads: OpOverload) -> None:
    for overload in overloads:
        assert overload not in _ZERO_RULES, f"two zero rules for {overload}"
        _ZERO_RULES[overload] = rule


def zero_rule_for(target: Any) -> ZeroRule | None:
    return first_is_zero if target is operator.getitem else _ZERO_RULES.get(target)


def first_is_zero(args: tuple[Any, ...], is_zero: Callable[[Any], bool]) -> bool:
    """f(0, ...) = 0, elementwise, or a pure rearrangement."""
    return bool(args) and is_zero(args[0])


def either_is_zero(args: tuple[Any, ...], is_zero: Callable[[Any], bool]) -> bool:
    return any(map(is_zero, args[:2]))


def both_are_zero(args: tuple[Any, ...], is_zero: Callable[[Any], bool]) -> bool:
    return all(map(is_zero, args[:2]))


def rule_for(target: Any) -> Rule | None:
    """The rule of an op; every op tagged pointwise has the pointwise rule."""
    if isinstance(target, RowWise):
        from packc.passes.rules.row_wise import row_wise

        return row_wise
    if isinstance(target, AsWritten):
        from packc.passes.rules.attention import as_written

        return as_written
    if not isinstance(target, OpOverload):
        return None
    if target in RULES:
        return RULES[target]
    if torch.Tag.pointwise in target.tags and not target._schema.is_mutable:
        from packc.passes.rules.pointwise import pointwise

        return pointwise
    return None


def broadcast_layout(op: Op, operands: list[fx.Node], shape: Any) -> tuple[Layout, dict[fx.Node, Layout]]:
    """Layout of a broadcast result of ``shape``, and for each operand which of its axes must be packed to fit it.

    An operand without a layout (a position table, a per-row scale) is read along the token axes it spans: where its
    size is not 1, that axis is the batch or the sequence, because broadcasting says so.
    """
    rank = len(shape)
    out = [Axis.OTHER] * rank
    for operand in operands:
        layout = op.layout(operand)
        for axis, kind in enumerate(layout or (), start=rank - len(layout or ())):
            if kind is Axis.OTHER:
                continue
            size = value_of(operand).shape[axis - rank]
            if not same_size(size, shape[axis]):
                raise NotTokenwise(f"operand {operand.name} is broadcast along its {kind.value} axis")
            if out[axis] not in (Axis.OTHER, kind):
                raise NotTokenwise(f"operands disagree: axis {axis} is both {out[axis].value} and {kind.value}")
            out[axis] = kind
    result = tuple(out)
    if not covers_tokens(result):
        raise NotTokenwise("no operand has token axes")
    needs: dict[fx.Node, Layout] = {}
    for operand in operands:
        sizes = value_of(operand).shape
        aligned = result[rank - len(sizes) :]
        own = op.layout(operand)
        if covers_tokens(own):
            if own != aligned:
                raise NotTokenwise(f"operand {operand.name} {show(own)} meets {show(result)}")
            needs[operand] = aligned
            continue
        spans = {kind for kind, size in zip(aligned, sizes, strict=True) if not same_size(size, 1)} - {Axis.OTHER}
        if Axis.FLAT in spans:
            raise NotTokenwise(f"operand {operand.name} varies along tokens and features at once")
        if spans == {Axis.BATCH} and Axis.SEQ not in aligned:
            raise NotTokenwise(f"operand {operand.name} varies by row but has no axis to lie along the tokens")
        if spans:
            needs[operand] = aligned
    return result, needs
