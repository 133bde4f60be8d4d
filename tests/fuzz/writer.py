"""A program while it is being written: every line runs on an example first, and those that fail are not kept."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import packc
from fuzz.batches import make_inputs
from fuzz.program import POSITIONS, ROWS, Axis, Input, Program, Value, are_tokens, features


class Writer:
    def __init__(self, seed: int, sizes: tuple[int, int], width: int, symbolic: str) -> None:
        self.seed, self.sizes, self.width, self.symbolic = seed, sizes, width, symbolic
        self.random = random.Random(seed)
        self.inputs: list[Input] = []
        self.lines: list[str] = []
        self.values: list[Value] = []
        self.masked: dict[str, str] = {}
        self.groups: list[set[str]] = []
        self.scope: dict[str, Any] = {"torch": torch, "F": F, "packc": packc, "B": sizes[0], "L": sizes[1]}
        self.count = 0
        self.axes: dict[str, tuple[Axis, ...]] = {}

    # ---- inputs ----

    def input(self, name: str, axes: Iterable[Axis], kind: str, **more: Any) -> Value:
        made = Input(name, tuple(axes), kind, **more)
        self.inputs.append(made)
        self.scope.update(make_inputs([made], self.sizes, "full", self.seed + len(self.inputs)))
        tokens = are_tokens(made.axes) and kind in ("values", "ids")
        if tokens:
            self.groups.append({name})
        dtype = "float" if made.dtype.is_floating_point else "bool" if made.dtype == torch.bool else "int"
        value = Value(name, made.axes, dtype, frozenset([name] if tokens else []))
        self.axes[name] = made.axes
        if kind in ("values", "ids"):
            self.values.append(value)
        return value

    def parameter(self, *sizes: int) -> str:
        kind = "parameter" if self.random.random() < 0.8 else "buffer"
        return self.input(f"w{len(self.inputs)}", map(features, sizes), kind).name

    @property
    def mask(self) -> str:
        return "attention_mask"

    def mask_for(self, value: Value) -> str:
        masks = [self.masked[each] for each in sorted(value.sources) if each in self.masked]
        return self.random.choice(masks or list(self.masked.values()))

    def masks_of(self, value: Value) -> set[str]:
        """Of all inputs that those which a value is made from have met."""
        met = set(value.sources).union(*(group for group in self.groups if group & value.sources))
        return {self.masked[each] for each in met if each in self.masked}

    # ---- choice ----

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def choose(self, *options: Any) -> Any:
        return self.random.choice(options)

    def pick(self, wanted: Callable[[Value], bool] = lambda value: True) -> Value | None:
        """One of the values, rather a late one."""
        found = [value for value in self.values if wanted(value)]
        if not found:
            return None
        return found[-1 - min(int(self.random.expovariate(0.35)), len(found) - 1)]

    def tokens(self, width: int | None = None) -> Value | None:
        """Values (B, L, width), of any width if none is given; made from others if there are none."""

        def fits(value: Value) -> bool:
            kinds = [axis.kind for axis in value.axes]
            return kinds == ["B", "L", "."] and value.dtype == "float" and width in (None, self.size(value, 2))

        found = self.pick(fits)
        if found is None and width is not None:
            wide = self.tokens()
            if wide is not None:
                weight = self.parameter(width, self.size(wide, 2))
                return self.add(f"F.linear({wide.name}, {weight})", (*wide.axes[:2], features(width)), wide)
        return found

    def floats(self) -> Value | None:
        return self.pick(lambda value: value.dtype == "float")

    def size(self, value: Value, axis: int) -> int:
        return self.scope[value.name].shape[axis]

    # ---- lines ----

    def add(
        self, expression: str, axes: Iterable[Axis], *of: Value, keep: bool = True, cut: str = "", meet: bool = True
    ) -> Value | None:
        """A line that makes a value of others; None if it cannot be computed."""
        name = f"v{self.count}"
        found = self.write(f"{name} = {expression}", {name: axes}, *of, keep=keep, cut=cut, meet=meet)
        return found[0] if found else None

    def write(
        self,
        line: str,
        made: dict[str, Iterable[Axis]],
        *of: Value,
        keep: bool = True,
        cut: str = "",
        meet: bool = True,
    ) -> list[Value]:
        """Lines that make values of these names. Unless they ``meet``, what is not in ``of`` is another sequence's."""
        scope = dict(self.scope)
        try:
            exec(line, scope)
        except (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError):
            return []
        sources = frozenset[str]().union(*(each.sources for each in of))
        values = []
        for name, axes in made.items():
            result, given = scope[name], tuple(axes)
            if not isinstance(result, Tensor) or result.numel() == 0 or result.numel() > 20_000:
                return []
            expected = [eval(axis.size, {}, {"B": self.sizes[0], "L": self.sizes[1]}) for axis in given]
            assert list(result.shape) == expected, f"{line}: {tuple(result.shape)} is not {given}"
            if result.is_floating_point() and not (result.isfinite().all() and result.abs().max() < 1e4):
                return []
            dtype = "float" if result.is_floating_point() else "bool" if result.dtype == torch.bool else "int"
            cuts = {each.cut for each in of}
            known = len(cuts) == 1 and all(each.axes[:2] == given[:2] for each in of)
            inherited = cuts.pop() if known else "?" if any(cuts) else ""
            values.append(Value(name, given, dtype, sources, "?" if cut and inherited else cut or inherited))
        self.scope = scope
        self.lines.append(line)
        self.count += 1
        self.axes.update((value.name, value.axes) for value in values)
        if meet:
            self._meet(line, sources)
        if keep:
            self.values += values
        return values

    def name(self) -> str:
        return f"v{self.count}"

    def _meet(self, line: str, sources: frozenset[str]) -> None:
        """Inputs that a line reads, or that belong to a mask or labels that it reads, are of one sequence."""
        words = set(re.findall(r"\w+", line))
        met = {name for name, mask in self.masked.items() if mask in words} | ({"labels"} & words) | sources
        if sources and len(met) > 1:
            joined = set().union(met, *(group for group in self.groups if group & met))
            self.groups = [group for group in self.groups if not group & met] + [joined]

    def program(self, outputs: Iterable[Value]) -> Program:
        groups = tuple(map(frozenset, self.groups))
        inputs, masked = tuple(self.inputs), dict(self.masked)
        whole = Program(self.seed, self.sizes, self.symbolic, inputs, (), (), masked, groups, self.axes)
        return whole.with_parts(self.lines, outputs)


BATCH_SEQ = (ROWS, POSITIONS)
