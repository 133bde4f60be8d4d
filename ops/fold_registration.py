"""What follows from a mixer's summary for many segments: ``packc::<name>_fold`` and ``packc::<name>_fold_adjoint``.

::

    packc::<name>_fold(Tensor transitions, Tensor states, <through_takes>, Tensor upstream, Tensor ends)
            -> (Tensor entering, Tensor kept)
        of segments' transitions (S, *transition) and states (S, *state), from the first on:
        entering = states[s]                                   where ends[s]
        entering = transitions[s] entering + states[s]         elsewhere
        and as it was where s is not upstream; zero before the first
    packc::<name>_fold_adjoint(<the same>) -> Tensor entering
        the same from the last on, of gradients of states, by the transposes of transitions

The segment that would be the last of the way has nothing downstream, and no say. ``entering`` is ``(1, *state)``, and
``kept`` are the transitions in memory of their own: what was gathered with them may go. ``upstream`` and ``ends`` are
bool ``(S,)``: values, so that one graph serves every rank. Documents are kept apart by selection: a NaN of one is none
of the others.

These are whole ops, for a compiler that opens them makes several loops of each, over a few numbers, and C++ of each
loop. They are plain torch on every device, and have its derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from packc.ops import derivatives
from packc.ops import summary as summaries
from packc.ops.definition import define, schema
from packc.ops.flops import count_flops
from packc.ops.mixer import Mixer
from packc.ops.shapes import Shapes, Sizes
from packc.ops.summary import Summary, Through


def register(mixer: Mixer, summary: Summary) -> None:
    """The two ops of ``mixer``."""
    _define(mixer, "fold", summary, summary.through, to_right=True)
    _define(mixer, "fold_adjoint", summary, summary.through_adjoint, to_right=False)


def _define(mixer: Mixer, what: str, summary: Summary, through: Through, to_right: bool) -> None:
    name, weights = f"{mixer.name}_{what}", summary.through_takes
    shapes = Shapes(
        name,
        {
            "transitions": f"segments {summary.transition}",
            "states": f"segments {mixer.state}",
            **{each: mixer.shape_of[each] for each in weights},
        },
        "states",
    )

    def kernel(transitions: Tensor, states: Tensor, *others: Tensor) -> Any:
        *given, upstream, ends = others
        shapes.check_sizes((transitions, states, *given), None)
        arguments = dict(zip(weights, given, strict=True))
        segments = range(states.shape[0])
        order = (segments if to_right else segments[::-1])[:-1]

        def passed(s: int, entering: Tensor) -> Tensor:
            return through(transitions[s : s + 1], entering, arguments) + states[s : s + 1]

        walk = _walk_on_host if summaries.on_host(ends) else _walk
        entering = walk(passed, states, order, upstream, ends)
        return (entering, transitions.clone(memory_format=torch.contiguous_format)) if to_right else entering

    def fake(transitions: Tensor, states: Tensor, *_: Tensor) -> Any:
        entering = states.new_empty((1, *states.shape[1:]))
        return (entering, transitions.new_empty(transitions.shape)) if to_right else entering

    def flops(**sizes: Any) -> int:
        return (sizes["segments"] - 1) * _of_one(mixer, summary, sizes)

    names = ["transitions", "states", *weights, "upstream", "ends"]
    returns = "(Tensor entering, Tensor kept)" if to_right else "Tensor"
    define(schema(name, dict.fromkeys(names, "Tensor"), returns), kernel, fake)
    count_flops(name, flops, shapes, names)
    derivatives.register_gradients(name, kernel)


# What segment s hands on of what enters it.
_Passed = Callable[[int, Tensor], Tensor]


def _walk(passed: _Passed, states: Tensor, order: range, upstream: Tensor, ends: Tensor) -> Tensor:
    entering = torch.zeros_like(states[:1])
    for s in order:
        handed_on = torch.where(ends[s], states[s : s + 1], passed(s, entering))
        entering = torch.where(upstream[s], handed_on, entering)
    return entering


def _walk_on_host(passed: _Passed, states: Tensor, order: range, upstream: Tensor, ends: Tensor) -> Tensor:
    """The same of no more segments than there are upstream: of two ranks, none passes anything on."""
    entering, marks = None, list(zip(upstream.tolist(), ends.tolist(), strict=True))
    for s in order:
        is_upstream, anew = marks[s]
        if is_upstream:
            entering = states[s : s + 1] if entering is None or anew else passed(s, entering)
    return torch.zeros_like(states[:1]) if entering is None else entering.clone()


def _of_one(mixer: Mixer, summary: Summary, sizes: Sizes) -> int:
    """FLOPs of a segment: of a state that passes through, and a sum."""
    return math.prod(mixer.state_shape(sizes, 1)) * (summary.through_flops(**sizes) + 1)
