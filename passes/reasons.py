"""Why a graph, or a part of it, is not packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class NotPackable(Exception):
    """The graph cannot be packed exactly; the message names the op and says why."""

    def __init__(self, reason: str, boundaries: Sequence[Boundary] = ()) -> None:
        super().__init__(reason)
        self.boundaries = list(boundaries)


@dataclass(frozen=True)
class Boundary:
    """An op that reads its operands padded: scattered before it, gathered again after it."""

    node: str
    module: str
    reason: str

    def __str__(self) -> str:
        return f"{self.node} in {self.module or 'the model'}: {self.reason}"
