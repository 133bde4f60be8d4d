"""What the driver runs: steps, each a file of its own, and what they said.

A step's file prints a line of JSON for every case, with these facts among others of its own:

    case     its name; a case that begins says only ``{"begin": name}``
    ok       whether what was checked held; nothing where nothing is checked
    why      what went wrong, in a few words
    line     what should stand in the table at the end, if there is room
    about    a later line about the same takes the place of this one

Whatever else is printed goes to the log.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
Facts = dict[str, Any]


class Step(NamedTuple):
    name: str
    command: tuple[str, ...]  # a file beside this one and its arguments, or any command
    limit: float  # seconds, of which some may pass before anything is found
    least: float = 10.0  # seconds under which it is not worth beginning
    quiet: float = 60.0  # seconds without a word that mean it hangs
    restarts: int = 0  # how often it goes on after a case that ended or hung it
    environment: tuple[tuple[str, str], ...] = ()
    # Arguments that depend on what has been found so far, or why there is nothing to do: a string.
    ask: Callable[[list[Facts]], list[str] | str] = lambda found: []


def told_by(step: str, found: list[Facts]) -> list[Facts]:
    return [facts for facts in found if facts["step"] == step and "case" in facts]


def failed(facts: Facts) -> bool:
    return facts.get("ok") is False
