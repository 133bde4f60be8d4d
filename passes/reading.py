"""What an op means on tokens, whatever form they are in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import fx
from torch._ops import OpOverload

from packc.passes.asks import Ask
from packc.passes.axes import Kind, Layout


class NotTokenwise(Exception):
    """The op looks across tokens, or at axes in a way that no rule covers. The message is for people."""


class Call(NamedTuple):
    """One node of a reading.

    Among its arguments another call stands for its result, an :class:`~packc.passes.axes.Axis` for the size of that
    axis in the form in which the node is written, and a :class:`PaddedNumel` for what it says.
    """

    target: OpOverload | Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def is_mixer(self) -> bool:
        """Whether it is to be told where documents begin."""
        return "cu_seqlens" in self.arguments

    @property
    def arguments(self) -> list[str]:
        """The names of its arguments."""
        return [each.name for each in self.target._schema.arguments] if isinstance(self.target, OpOverload) else []


class PaddedNumel(NamedTuple):
    """How many elements a value has in the padded graph, in whatever form the node is written."""

    value: fx.Node


class InChunks(NamedTuple):
    """Given to a mixer as ``cu_seqlens``: documents are cut into chunks of so many tokens, each a document to it."""

    size: int


class Mean(NamedTuple):
    """A mean over tokens, as two sums: those of a part of the tokens make a mean over all."""

    total: Call
    number: Call


@dataclass
class Reading:
    """An op on tokens: the same op, where nothing else is said, with operands in one form."""

    results: Kind | list[Kind]
    """What its result is, or each of several."""
    operands: dict[fx.Node, Layout] = field(default_factory=dict)
    """Operands that follow the tokens, and which axis is which; the others are taken as they stand. An operand may have
    size one along a token axis (a scale per row, a table of positions): it is gathered along the axes it does span."""
    call: Call | None = None
    """What to write; None: the op itself."""
    mean: Mean | None = None
    """How to write it where a form has a part of the tokens; None: its results on parts sum to that on all."""
    padded: str | None = None
    """Why it runs padded, although its operands and its result follow the tokens: scattered before, gathered after it.
    What it gives at padding is not what the padded graph gives there."""
    is_mixer: bool = False
    """Whether it looks along the tokens, and must be told where documents begin."""
    zero_from: tuple[fx.Node, ...] = ()
    """Of a mixer, operands of which any one, zero at padding before a row's tokens, makes its result zero there."""
    asks: list[Ask] = field(default_factory=list)
    """What must hold for it to be exact where padding is left out."""
