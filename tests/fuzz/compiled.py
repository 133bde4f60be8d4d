"""A program through ``torch.compile``, Dynamo and AOTAutograd included."""

from __future__ import annotations

import random
from typing import Any

import torch

import packc
from fuzz.batches import KINDS, make_inputs
from fuzz.check import Outcome, compare
from fuzz.program import Program


def check_compiled(program: Program, *, batches: int = 2, inner: str = "aot_eager") -> Outcome:
    """
    Args:
        inner: what compiles the packed graph.

    Raises:
        Wrong: packed is not eager.
    """
    torch._dynamo.reset()
    options: dict[str, Any] = {"packc.inner": inner}
    compiled = torch.compile(program.function(), backend="packc", options=options, dynamic=bool(program.symbolic))
    draw, outcome = random.Random(f"compiled {program.seed}"), Outcome("compiled")
    for number in range(batches):
        inputs = make_inputs(program.inputs, program.sizes, draw.choice(KINDS), number)
        if compare(program, compiled, inputs, f"compiled, batch {number}"):
            outcome.batches += 1
    return outcome


def report(program: Program) -> Any:
    """What packc says that it did."""
    torch._dynamo.reset()
    inputs = make_inputs(program.inputs, program.sizes, "right", 0)
    return packc.explain(program.function())(*inputs.values())
