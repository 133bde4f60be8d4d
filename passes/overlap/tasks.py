"""Tasks of a step, in program order: what is scheduled."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Order = Sequence[int]
"""Numbers of tasks, in the order in which they are issued."""


@dataclass(frozen=True)
class Task:
    """A task; of a sequence of them, one is known by its number in it."""

    name: str
    seconds: float
    """Of work: on the compute stream, or of a collective on the communication stream. A wait has none of its own."""
    after: tuple[int, ...] = ()
    """Earlier tasks whose results it takes."""
    kind: Literal["compute", "start", "wait"] = "compute"
    """A collective is a ``start``, at which its communication may begin, and a ``wait`` after it."""
    makes: int = 0
    """Bytes of its result, which live until the last of those that take it has been issued; of a collective, until the
    last has that takes what was waited for."""


def users_of(tasks: Sequence[Task]) -> list[list[int]]:
    users: list[list[int]] = [[] for _ in tasks]
    for number, task in enumerate(tasks):
        for before in task.after:
            users[before].append(number)
    return users


def is_valid(tasks: Sequence[Task], order: Order) -> bool:
    """Whether every task is issued once, after those whose results it takes."""
    place = {number: at for at, number in enumerate(order)}
    return sorted(order) == list(range(len(tasks))) and all(
        place[before] < place[number] for number, task in enumerate(tasks) for before in task.after
    )


def collectives(tasks: Sequence[Task], order: Order) -> list[int]:
    """The starts, in the order in which they are issued: it must be one on all ranks."""
    return [number for number in order if tasks[number].kind == "start"]


def started_by(tasks: Sequence[Task], wait: int) -> int:
    """The collective that a task waits for."""
    return next(before for before in tasks[wait].after if tasks[before].kind == "start")


def longest_ways(tasks: Sequence[Task]) -> list[float]:
    """Of every task: seconds from its beginning to the end of the step, if all could run side by side."""
    ways = [0.0] * len(tasks)
    users = users_of(tasks)
    for number in reversed(range(len(tasks))):
        ways[number] = tasks[number].seconds + max((ways[user] for user in users[number]), default=0.0)
    return ways


def total(tasks: Iterable[Task], *kinds: str) -> float:
    return sum(task.seconds for task in tasks if task.kind in kinds)
