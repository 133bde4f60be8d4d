"""``torch.compile(options=...)``: packc's own keys and everybody else's."""

from __future__ import annotations

import difflib
from typing import Any, NamedTuple

from packc import config

_PREFIX = "packc."
# Read when an op runs, where no compiled model is known.
_PROCESS_WIDE = {"kernels"}


class SequenceOptions(NamedTuple):
    """``packc.sequence`` and what begins with it. No settings: a group is of one model, and can be neither copied nor
    pickled."""

    group: Any = None
    """A process group or a mesh, over which tokens are cut."""
    outputs: str = "whole"
    """Whether what is returned of tokens is gathered, or ``"local"``."""
    cuts: str = "tokens"
    """Of what ranks have equally much: tokens, or ``"work"``."""


_SEQUENCE = {_PREFIX + "sequence": "group"} | {f"{_PREFIX}sequence_{name}": name for name in ("outputs", "cuts")}
_VALUES = {"outputs": ("whole", "local"), "cuts": ("tokens", "work")}


def take_sequence(options: dict[str, Any] | None) -> tuple[SequenceOptions, dict[str, Any]]:
    """(how sequences are cut, the other options).

    Raises:
        ValueError: an option that is not one of its values.
    """
    others = dict(options or {})
    found = SequenceOptions(**{name: others.pop(key) for key, name in _SEQUENCE.items() if key in others})
    check_sequence(found)
    return found, others


def check_sequence(options: SequenceOptions) -> None:
    for name, values in _VALUES.items():
        if getattr(options, name) not in values:
            raise ValueError(f"packc.sequence_{name} must be one of {values}, not {getattr(options, name)!r}")


def split_options(options: dict[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """(settings for :mod:`packc.config`, options for the inner backend).

    Raises:
        ValueError: a ``packc.`` key that is no option, or not one of a single model.
    """
    own, others = {}, {}
    known = set(config.get_config_copy())
    for key, value in (options or {}).items():
        if not key.startswith(_PREFIX):
            others[key] = value
            continue
        name = key.removeprefix(_PREFIX)
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {_PREFIX}{close[0]!s}?" if close else ""
            raise ValueError(f"unknown option {key!r}: packc has {sorted(_PREFIX + n for n in known)}{hint}")
        if name in _PROCESS_WIDE:
            raise ValueError(f"{key!r} holds for the whole process: set packc.config.{name} instead")
        own[name] = value
    return own, others
