"""A random model as Python text, what it is called with, and what is known of the axes of what it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import packc


class Axis(NamedTuple):
    kind: str
    """``B`` rows, ``L`` positions, ``T`` both flattened, ``F`` those and features; ``.`` anything else, which is
    the same for stock and packed."""
    size: str
    """As the text writes it: ``L``, ``B * L``, ``4``."""


ROWS, POSITIONS, TOKENS = Axis("B", "B"), Axis("L", "L"), Axis("T", "B * L")


def features(size: int | str) -> Axis:
    return Axis(".", str(size))


def are_tokens(axes: Iterable[Axis]) -> bool:
    """Whether packc may leave padding out of such a value."""
    kinds = sorted(axis.kind for axis in axes if axis.kind != ".")
    return kinds in (["B", "L"], ["T"], ["F"])


@dataclass(frozen=True)
class Value:
    name: str
    axes: tuple[Axis, ...]
    dtype: str
    """``float``, ``int`` or ``bool``."""
    sources: frozenset[str]
    """Inputs with token axes that it is made from."""
    cut: str = ""
    """How it was cut from values (B, L, ...), ``{}[:, 1:]``: its padding is what a mask cut like that says; ``?`` if a
    value so cut is among what it is made from, and nobody knows."""


@dataclass(frozen=True)
class Input:
    name: str
    axes: tuple[Axis, ...]
    kind: str
    """``values``, ``ids``, ``labels``, ``mask``, ``parameter``, ``buffer`` or ``index``."""
    bound: int = 0
    """Of integers: one past the largest."""
    dtype: torch.dtype = torch.float64


@dataclass(frozen=True)
class Program:
    seed: int
    sizes: tuple[int, int]
    """B and L of the example."""
    symbolic: str
    """Which of ``B`` and ``L`` are symbols when it is traced."""
    inputs: tuple[Input, ...]
    lines: tuple[str, ...]
    outputs: tuple[Value, ...]
    masked: dict[str, str] = field(default_factory=dict)
    """Input with token axes -> the mask that belongs to it."""
    groups: tuple[frozenset[str], ...] = ()
    """Inputs with token axes that meet in some op."""
    axes: dict[str, tuple[Axis, ...]] = field(default_factory=dict)
    """Of every value that a line makes, and of inputs."""

    @property
    def text(self) -> str:
        arguments = ", ".join(each.name for each in self.inputs)
        results = ", ".join(each.name for each in self.outputs)
        body = [f"B, L = {self.mask}.shape", *self.lines, f"return ({results},)"]
        return "\n    ".join([f"def model({arguments}):", *"\n".join(body).split("\n")])

    @property
    def mask(self) -> str:
        return next(each.name for each in self.inputs if each.kind == "mask")

    def function(self) -> Callable[..., tuple[Tensor, ...]]:
        scope = {"torch": torch, "F": F, "packc": packc, "__name__": "program"}
        exec(self.text, scope)
        return scope["model"]  # type: ignore[return-value]

    def masks_of(self, value: Value) -> list[str]:
        """The masks that say which entries of a value count."""
        met = set(value.sources).union(*(group for group in self.groups if group & value.sources))
        return sorted({self.masked[each] for each in met if each in self.masked})

    def with_parts(self, lines: Iterable[str], outputs: Iterable[Value]) -> Program:
        """The same with fewer lines or outputs, and without the inputs that nothing reads."""
        lines, outputs = tuple(lines), tuple(outputs)
        words = set("".join(c if c.isalnum() or c == "_" else " " for c in "\n".join(lines)).split())
        kept = [each for each in self.inputs if each.name in words | {self.mask, *(o.name for o in outputs)}]
        masked = {name: mask for name, mask in self.masked.items() if mask in {each.name for each in kept}}
        return replace(self, lines=lines, outputs=outputs, inputs=tuple(kept), masked=masked)

    def describe(self) -> str:
        """All that it takes to run it by hand."""
        lines = [f"# seed {self.seed}: B, L = {self.sizes}, symbolic: {self.symbolic or 'no'}"]
        for each in self.inputs:
            shape = ", ".join(axis.size for axis in each.axes)
            lines.append(f"# {each.name}: {each.kind} ({shape}) {each.dtype}")
        return "\n".join([*lines, self.text])


def axis_mask(value: Value, shape: Any, mask: Tensor) -> Tensor:
    """A mask (B, L) along the token axes of a value of this shape, to be broadcast over the others."""
    kinds = [axis.kind for axis in value.axes]
    if "T" in kinds or "F" in kinds:
        at = kinds.index("T") if "T" in kinds else kinds.index("F")
        flat = mask.reshape(-1)
        if flat.numel():
            flat = flat.repeat_interleave(shape[at] // flat.numel())
        return flat.view([-1 if axis == at else 1 for axis in range(len(kinds))])
    rows, positions = kinds.index("B"), kinds.index("L")
    ordered = mask if rows < positions else mask.T
    return ordered.reshape([size if axis in (rows, positions) else 1 for axis, size in enumerate(shape)])
