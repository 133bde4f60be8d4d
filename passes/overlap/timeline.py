"""What an order of tasks takes: time, exposed communication and memory, simulated.

Each rank has a compute stream and a communication stream, and issues its tasks one by one: compute runs where it is
issued, a collective begins once all ranks have issued it and their communication streams are free, a wait holds its
rank until the collective has ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from packc.passes.overlap.tasks import Order, Task, collectives, started_by, users_of


@dataclass
class Interval:
    """A task on one of a rank's streams; a wait is on neither, and as long as the rank stood still."""

    task: int
    begin: float
    end: float


@dataclass
class Timeline:
    """Of all ranks."""

    ranks: list[list[Interval]] = field(default_factory=list)
    """Every task of each rank, in the order issued."""
    exposed: list[float] = field(default_factory=list)
    """Seconds that each rank stood still."""
    peak: list[int] = field(default_factory=list)
    """Most bytes alive at once on each rank, of what tasks make."""

    @property
    def seconds(self) -> float:
        return max((each.end for rank in self.ranks for each in rank), default=0.0)


def simulate(ranks: Sequence[Sequence[Task]], orders: Sequence[Order]) -> Timeline:
    """Tasks and order of every rank. The n-th collective of one is the n-th of all.

    Raises:
        ValueError: ranks issue collectives of different names, or a different number of them.
    """
    issued = [collectives(tasks, order) for tasks, order in zip(ranks, orders, strict=True)]
    names = {tuple(tasks[number].name for number in rank) for tasks, rank in zip(ranks, issued, strict=True)}
    if len(names) > 1:
        raise ValueError(f"ranks issue their collectives in different orders: {sorted(names)}")
    timeline = Timeline(
        [[] for _ in ranks], [0.0] * len(ranks), [peak(*each) for each in zip(ranks, orders, strict=True)]
    )
    clocks, places = [0.0] * len(ranks), [0] * len(ranks)
    free = 0.0  # when the communication streams are: they are busy together
    starts: list[dict[int, float]] = [{} for _ in ranks]  # when each rank issued each collective
    ends: list[float] = []  # of collectives
    while any(place < len(order) for place, order in zip(places, orders, strict=True)):
        for rank, (tasks, order) in enumerate(zip(ranks, orders, strict=True)):
            while places[rank] < len(order):
                number = order[places[rank]]
                task, now = tasks[number], clocks[rank]
                if task.kind == "wait":
                    nth = issued[rank].index(started_by(tasks, number))
                    if nth >= len(ends):
                        break  # another rank has yet to issue it
                    clocks[rank] = max(now, ends[nth])
                    timeline.exposed[rank] += clocks[rank] - now
                elif task.kind == "start":
                    starts[rank][issued[rank].index(number)] = now
                else:
                    clocks[rank] = now + task.seconds
                timeline.ranks[rank].append(Interval(number, now, clocks[rank]))
                places[rank] += 1
        while all(len(ends) in mine for mine in starts):  # every rank has issued the next one
            nth = len(ends)
            begin = max(free, *(mine[nth] for mine in starts))
            free = begin + max(tasks[mine[nth]].seconds for tasks, mine in zip(ranks, issued, strict=True))
            ends.append(free)
            for rank, mine in enumerate(issued):
                interval = next(each for each in timeline.ranks[rank] if each.task == mine[nth])
                interval.begin, interval.end = begin, free
    return timeline


def peak(tasks: Sequence[Task], order: Order) -> int:
    """Most bytes alive at once."""
    place = {number: at for at, number in enumerate(order)}
    users = users_of(tasks)
    waits = {started_by(tasks, number): number for number, task in enumerate(tasks) if task.kind == "wait"}

    def last_use(number: int) -> int:
        """A collective's operands are read, and its result is written, until it has been waited for."""
        ends = [number, *users[number]]
        if number in waits:
            ends += users[waits[number]]
        return max(place[waits.get(each, each)] for each in ends)

    freed: dict[int, int] = {}
    for number, task in enumerate(tasks):
        freed[last_use(number)] = freed.get(last_use(number), 0) + task.makes
    live = most = 0
    for at, number in enumerate(order):
        live += tasks[number].makes
        most = max(most, live)
        live -= freed.get(at, 0)
    return most
