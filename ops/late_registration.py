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

import torch
from torch import Tensor

from packc.ops.flops import count_flops
from packc.ops.implementations import implementations
from packc.ops.mixer import Mixer
from packc.ops.shapes import Shapes
from packc.ops.summary import Late


def register(library: torch.library.Library, mixer: Mixer, late: Late) -> None:
    """The two ops of ``mixer``."""
    implementation, changed = implementations(mixer), len(mixer.results)

    def enter(*args: Any) -> None:
        # Of the state's dtype there is one tensor that tells.
        kernels = implementation(args[changed].dtype, args[0])
        late.enter(kernels, args[:changed], *_in(args[changed].dtype, mixer, mixer.enter_arguments, args)[changed:])

    gradients = len(late.leave_changes)

    def leave(*args: Any) -> None:
        given = _in(args[gradients].dtype, mixer, mixer.leave_arguments, args)
        late.leave(args[:gradients], *given[gradients:])

    shape_of = {name.rstrip("?"): shape for name, shape in mixer.tensors.items()}
    out = {"out": mixer.out or shape_of[mixer.like]}
    _define(library, mixer, "enter", mixer.enter_arguments, {**out, **shape_of}, enter, late.flops)
    changes = {f"d{name}": shape_of[name] for name in late.leave_changes}
    _define(library, mixer, "leave", mixer.leave_arguments, {**changes, **shape_of}, leave, late.leave_flops)


def _in(dtype: torch.dtype, mixer: Mixer, arguments: Mapping[str, str], args: tuple[Any, ...]) -> list[Any]:
    """With what states hang on in their dtype."""
    return [
        x.to(dtype) if name in mixer.in_state_dtype and isinstance(x, Tensor) else x
        for name, x in zip(arguments, args, strict=True)
    ]


def _define(
    library: torch.library.Library,
    mixer: Mixer,
    what: str,
    arguments: Mapping[str, str],
    shape_of: Mapping[str, str],
    kernel: Callable[..., None],
    flops: Callable[..., int],
) -> None:
    name = f"{mixer.name}_{what}"
    library.define(f"{name}({', '.join(f'{kind} {argument}' for argument, kind in arguments.items())}) -> ()")
    library.impl(name, kernel, "CPU")
    library.impl(name, kernel, "CUDA")
    torch.library.register_fake(f"packc::{name}", lambda *args: None, lib=library)
    shapes = Shapes(name, {each: shape for each, shape in shape_of.items() if each in arguments}, next(iter(arguments)))
    options = [argument for argument in arguments if argument in mixer.options]
    count_flops(getattr(torch.ops.packc, name), flops, shapes, arguments, options)
