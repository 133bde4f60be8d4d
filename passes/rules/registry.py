"""What a rule is: a function from a node of the padded graph to its packed form."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from packc.passes.axes import Axis, Layout, covers_tokens, is_tensor, same_size, show, value_of


class NotTokenwise(Exception):
    """The op looks across tokens, or at axes in a way that no rule covers. The message is for people."""


class Placeholder(enum.Enum):
    """Stands in the arguments of a packed form for a value that only the packed graph has."""

    TOKENS = enum.auto()  # T, as a size
    CU_SEQLENS = enum.auto()  # int32 (B + 1,)


@dataclass
class PackedForm:
    """An op on packed operands: the same op, with arguments rewritten where they speak of B and L.

    ``layouts`` is the layout of the result, or a tuple of them for an op with several; None for a result without
    token axes (a loss, a document's final state), which is the same value in the padded graph.
    """

    layouts: Layout | None | list[Layout | None]
    operands: dict[fx.Node, Layout] = field(default_factory=dict)
    """Operands wanted in packed form, and which axis is which; the others are taken as they stand. An operand may have
    size one along a token axis (a scale per row, a table of positions): it is gathered along the axes it does span."""
    args: tuple[Any, ...] | None = None
    kwargs: dict[str, Any] | None = None
    target: OpOverload | None = None
    is_mixer: bool = False
    zero_at_padding: list[fx.Node] = field(default_factory=list)
    """Exact only if these values are zero at padding in the padded graph (they are summed over tokens)."""
    ignored_at_padding: tuple[fx.Node, int] | None = None
    """(labels, ignore_index): exact only where every token left out carries this label; asked of each batch."""
    keep_left_unless_zero: tuple[fx.Node, str] | None = None
    """(value, reason): left padding must stay in the pack unless this value is zero there in the padded graph."""
    keep_left: str | None = None
    """Why left padding must stay in the pack: the op would notice that it is gone."""
    keep_right: str | None = None
    scale_by_padded_numel: fx.Node | None = None
    """Divide the result by this value's size in the padded graph (a mean over tokens and padding alike)."""


class Op:
    """A node of the padded graph, as rules ask about it."""

    def __init__(self, node: fx.Node, layouts: dict[fx.Node, Any], batch: Any, length: Any) -> None:
        self.node = node
        self.batch, self.length = batch, length
        self.target: OpOverload = node.target  # type: ignore[assignment]
        self._layouts = layouts
        self.args = self._positional()

    def _positional(self) -> tuple[Any, ...]:
        """All arguments in schema order, defaults filled in: rules never ask where a caller wrote one."""
        given = list(self.node.args)
        for argument in self.target._schema.arguments[len(given) :]:
            given.append(self.node.kwargs.get(argument.name, argument.default_value))
        return tuple(given)

    def with_args(self, **changed: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``(args, kwargs)`` with the named ones replaced."""
        args, kwargs = [], {}
        for argument, value in zip(self.target._schema.arguments, self.args, strict=True):
            value = changed.get(argument.name, value)
            if argument.kwarg_only:
                kwargs[argument.name] = value
            else:
                args.append(value)
        return tuple(args), kwargs

    def layout(self, arg: Any) -> Layout | None:
        return self._layouts.get(arg) if isinstance(arg, fx.Node) else None

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


Rule = Callable[[Op], PackedForm]
RULES: dict[OpOverload, Rule] = {}


def register_rule(*overloads: OpOverload) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        for overload in overloads:
            assert overload not in RULES, f"two rules for {overload}"
            RULES[overload] = rule
        return rule

    return register


def rule_for(target: Any) -> Rule | None:
    """The rule of an op; every op tagged pointwise has the pointwise rule."""
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
        if spans == {Axis.BATCH} and Axis.SEQ not in aligned:
            raise NotTokenwise(f"operand {operand.name} varies by row but has no axis to lie along the tokens")
        if spans:
            needs[operand] = aligned
    return result, needs
