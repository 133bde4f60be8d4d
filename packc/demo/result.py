"""What a contender did, and the figures taken from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from packc.demo.contender import Step


@dataclass
class Result:
    """One contender of the demo. All of its runs begin at the same weights."""

    name: str
    warm: list[Step]
    """Steps on the first batch with everything compiled: timed."""
    cold: Step | None = None
    """The first step of all, on the first batch: compiles. None in eager."""
    curve: list[Step] = field(default_factory=list)
    """One step on each batch, as training goes."""
    repeated: list[float] = field(default_factory=list)
    """Losses of training on the first batch over and over: what stock Inductor, bound to one shape, can be held to."""

    @property
    def step_seconds(self) -> float:
        return median(step.seconds for step in self.warm)

    @property
    def peak_mib(self) -> float:
        return max(step.peak_mib for step in self.warm)

    @property
    def compile_seconds(self) -> float | None:
        return None if self.cold is None else self.cold.seconds - self.step_seconds

    def losses(self) -> list[float]:
        return [step.loss for step in self.curve]


def largest_difference(ours: list[float], theirs: list[float]) -> float:
    """Between two loss curves over the steps that both have, relative to theirs; NaN if there is one in either."""
    steps = min(len(ours), len(theirs))
    a, b = (torch.tensor(losses[:steps], dtype=torch.float64) for losses in (ours, theirs))
    return ((a - b) / b).abs().max().item()
