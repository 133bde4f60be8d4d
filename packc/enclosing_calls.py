"""What the calls around a compiled graph were given, and whether there are any.

A block that is compiled by itself, and a graph behind a graph break, are called with less than the model was: where
documents begin may be an argument of the model that is handed on to nobody. Stock mixes the documents then. When such a
graph is called, though, the model's own call still stands on the Python stack, and that is where this looks.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Iterator, Mapping
from types import CodeType, FrameType
from typing import Any, NamedTuple

from torch import Tensor, nn

from packc.frontends import BOUNDARIES

_LIBRARIES = ("torch", "packc")
_RESUMED = "torch_dynamo_resume_in_"


class _Arguments(NamedTuple):
    """Of a function: which of its arguments may be boundaries or hold them."""

    code: CodeType
    """Kept, so that its id stays its own."""
    skipped: bool
    """Whether it is torch's or packc's, or the rest of one behind a graph break, for which that one's call speaks."""
    names: tuple[str, ...]
    boundaries: tuple[str, ...]
    others: tuple[str, ...]
    """The name of ``**kwargs``, if it takes any."""


_known: dict[int, _Arguments] = {}


def boundaries_around() -> dict[str, Tensor]:
    """Those among the arguments of the call that runs the graph, and of the modules that this call is part of.

    Of two of one name the inner call's counts.
    """
    found: dict[str, Tensor] = {}
    for nth, (frame, arguments) in enumerate(_calls(sys._getframe(1).f_back)):
        runs_graph = nth == 0
        if runs_graph or arguments.boundaries or arguments.others:
            held = frame.f_locals
            if runs_graph or isinstance(held.get(arguments.names[0]), nn.Module):
                for holder in _holders(arguments, held, inside_any=runs_graph):
                    _take(found, holder)
    return found


def is_part_of_a_call() -> bool:
    """Whether the call that runs the graph is part of a module's, which may go on with what the graph returns."""
    around = itertools.islice(_calls(sys._getframe(1).f_back), 1, None)
    return any(
        arguments.names and isinstance(frame.f_locals.get(arguments.names[0]), nn.Module) for frame, arguments in around
    )


def _calls(frame: FrameType | None) -> Iterator[tuple[FrameType, _Arguments]]:
    """From the one that runs the graph outward."""
    while frame is not None:
        arguments = _known.get(id(frame.f_code)) or _arguments(frame.f_code, frame)
        if not arguments.skipped:
            yield frame, arguments
        frame = frame.f_back


def _arguments(code: CodeType, frame: FrameType) -> _Arguments:
    library = frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES
    takes_any = bool(code.co_flags & inspect.CO_VARKEYWORDS)
    count = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS) + takes_any
    names = code.co_varnames[:count]
    known = _known[id(code)] = _Arguments(
        code,
        skipped=library or code.co_name.startswith(_RESUMED),
        names=names,
        boundaries=tuple(name for name in names if name in BOUNDARIES),
        others=names[-1:] if takes_any else (),
    )
    return known


def _holders(arguments: _Arguments, held: Mapping[str, Any], *, inside_any: bool) -> Iterator[Mapping[str, Any]]:
    if arguments.boundaries:
        yield {name: held.get(name) for name in arguments.boundaries}
    for name in arguments.names if inside_any else arguments.others:
        if isinstance(inside := held.get(name), Mapping):
            yield inside


def _take(found: dict[str, Tensor], holder: Mapping[str, Any]) -> None:
    for name in BOUNDARIES if holder else ():
        if isinstance(value := holder.get(name), Tensor):
            found.setdefault(name, value)
