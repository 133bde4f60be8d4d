"""What follows from a mixer's :class:`packc.ops.summary.Late`: ``packc::<name>_enter`` and ``packc::<name>_leave``.

::

    packc::<name>_enter(<results>!, Tensor entering, <enter_takes>, Tensor end, Tensor document) -> ()
        what packc::<name> has made of tokens 0 .. end of a document, with the state that enters them now
    packc::<name>_leave(<gradients>!, Tensor leaving, Tensor before, <leave_takes>, Tensor begin) -> ()
        what packc::<name>_bwd has found of tokens begin .. L, with the gradient of the state that leaves them now

of one row, as the ops of ``summary_registration.py``; places are int64 ``(1,)``. They change what they are given, and
have no derivative: who calls them knows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from packc.ops.definition import define, schema
from packc.ops.flops import count_flops
from packc.ops.implementations import implementations, in_states_dtype
from packc.ops.mixer import Mixer
from packc.ops.shapes import Shapes
from packc.ops.summary import Late


def register(mixer: Mixer, late: Late) -> None:
    """The two ops of ``mixer``."""
    implementation, entered, left = implementations(mixer), len(mixer.results), len(late.leave_changes)
    in_enter = in_states_dtype(mixer, mixer.enter_arguments)
    in_leave = in_states_dtype(mixer, mixer.leave_arguments)

    def enter(*args: Any) -> None:
        # Of the state's dtype there is one tensor that tells.
        dtype = args[entered].dtype
        late.enter(implementation(dtype, args[0]), args[:entered], *in_enter(args, dtype)[entered:])

    def leave(*args: Any) -> None:
        dtype = args[left].dtype
        late.leave(implementation(dtype, args[0]), args[:left], *in_leave(args, dtype)[left:])

    _define(mixer, "enter", mixer.enter_arguments, {"out": mixer.shape_of_out}, enter, late.flops)
    changes = {f"d{name}": mixer.shape_of[name] for name in late.leave_changes}
    _define(mixer, "leave", mixer.leave_arguments, changes, leave, late.leave_flops)


def _define(
    mixer: Mixer,
    what: str,
    arguments: Mapping[str, str],
    changes: Mapping[str, str],
    kernel: Callable[..., None],
    flops: Callable[..., int],
) -> None:
    name = f"{mixer.name}_{what}"
    define(schema(name, arguments, "()"), kernel, lambda *args: None)
    shape_of = {**changes, **{each: shape for each, shape in mixer.shape_of.items() if each in arguments}}
    shapes = Shapes(name, shape_of, next(iter(arguments)))
    count_flops(name, flops, shapes, arguments, mixer.options)
