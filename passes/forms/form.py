"""What a form has to say; the writer of graphs (:mod:`packc.passes.write`) knows nothing else of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import fx

from packc.passes.axes import Axis, Layout
from packc.passes.reading import Call

Write = Callable[..., fx.Node]
"""``(target, *args, **kwargs)``: a node more in the graph that is being written."""


class Form(Protocol):
    """One way in which the values of tokens are kept: padded ``(B, L, ...)``, packed ``(1, T, ...)``."""

    @property
    def is_part(self) -> bool:
        """Whether others hold tokens too: no mean is taken of those that it holds."""

    def size(self, axis: Axis) -> Any:
        """How large a token axis is: a number, or a node that has it."""

    def enter(self, padded: fx.Node, layout: Layout, shape: Any, *, by_position: bool = False) -> fx.Node:
        """A padded value of this shape, brought into the form. Along axes of size one it is the same for all.

        ``by_position``: it has what belongs to each position, which is counted anew in every document.
        """

    def leave(self, value: fx.Node, layout: Layout, shape: Any) -> fx.Node:
        """A value of the form, padded to ``shape``."""

    def mixer(self, call: Call) -> Call:
        """A mixer of the padded graph, told where documents begin."""

    def total(self, value: fx.Node) -> fx.Node:
        """A sum over the tokens that the form holds, made a sum over all."""
