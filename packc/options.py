"""``torch.compile(options=...)``: packc's own keys and everybody else's."""

from __future__ import annotations

import difflib
from typing import Any

from packc import config

_PREFIX = "packc."
# Read when an op runs, where no compiled model is known.
_PROCESS_WIDE = {"kernels"}


_SEQUENCE = _PREFIX + "sequence"


def take_sequence(options: dict[str, Any] | None) -> tuple[Any, dict[str, Any]]:
    """(the mesh or group over which sequences are cut, the other options). No setting: a group is of one model, and can
    be neither copied nor pickled."""
    others = dict(options or {})
    return others.pop(_SEQUENCE, None), others


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
