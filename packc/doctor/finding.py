"""What a check found."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Finding(NamedTuple):
    """One line of the doctor's."""

    status: Literal["ok", "note", "fail"]
    """``note``: packc works all the same. ``fail``: it does not, or gives wrong results."""
    what: str
    detail: str = ""
