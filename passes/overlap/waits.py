"""What a graph waits for, how long, and what runs meanwhile: of the order that packc gives it, by its cost model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import fx

from packc.passes.module_names import module_path
from packc.passes.overlap.costs import RATES, Rates, device_of
from packc.passes.overlap.hide_communication import hide_communication, tasks_of
from packc.passes.overlap.policies import program_order
from packc.passes.overlap.tasks import Task, started_by
from packc.passes.overlap.timeline import Interval, simulate


class Wait(NamedTuple):
    """One collective. Seconds are the cost model's, not measured."""

    graph: str
    """``"forward"`` or ``"backward"``."""
    op: str
    module: str
    bytes: int
    """Of its result, on this rank."""
    seconds: float
    exposed: float
    """Seconds of them in which nothing else runs."""
    hidden_by: list[str]
    """The ops that run meanwhile, those that hide most first."""


@dataclass(frozen=True)
class Schedule:
    """One graph of a step, in the order in which it is run."""

    name: str
    tasks: Sequence[Task]
    modules: Sequence[str]
    """Of each task."""
    intervals: Sequence[Interval]

    @property
    def seconds(self) -> float:
        return max((each.end for each in self.intervals), default=0.0)

    def waits(self) -> list[Wait]:
        of = {each.task: each for each in self.intervals}
        ends = {started_by(self.tasks, each.task): each for each in self.intervals if self._is(each, "wait")}
        return [
            Wait(
                self.name,
                _short(self.tasks[start].name),
                self.modules[start],
                self.tasks[start].makes,
                self.tasks[start].seconds,
                wait.end - wait.begin,
                self._meanwhile(of[start]),
            )
            for start, wait in sorted(ends.items(), key=lambda item: of[item[0]].begin)
        ]

    def _meanwhile(self, collective: Interval) -> list[str]:
        shares: dict[str, float] = {}
        for each in self.intervals:
            both = min(each.end, collective.end) - max(each.begin, collective.begin)
            if both > 0 and self._is(each, "compute"):
                name = _short(self.tasks[each.task].name)
                shares[name] = shares.get(name, 0.0) + both
        return sorted(shares, key=lambda name: -shares[name])

    def events(self, begin: float) -> list[dict[str, Any]]:
        """Chrome's trace events (a ``X`` each; its format's specification, section "Complete Events")."""
        lanes = {"compute": 0, "wait": 0, "start": 1}
        return [
            {
                "name": _short(self.tasks[each.task].name),
                "cat": self.name,
                "ph": "X",
                "pid": 0,
                "tid": lanes[self.tasks[each.task].kind],
                "ts": 1e6 * (begin + each.begin),
                "dur": 1e6 * (each.end - each.begin),
                "args": {"module": self.modules[each.task], "bytes": self.tasks[each.task].makes},
            }
            for each in self.intervals
            if each.end > each.begin
        ]

    def _is(self, interval: Interval, kind: str) -> bool:
        return self.tasks[interval.task].kind == kind


def schedule(name: str, graph: fx.Graph, rates: Rates | None = None) -> Schedule:
    """The order that ``graph`` is given; it stays as it is."""
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    modules = [module_path(node) for node in nodes]
    copy = fx.Graph()
    copy.graph_copy(graph, {})
    hidden = hide_communication(copy, rates)
    if hidden is not None:
        tasks, timeline = hidden.tasks, hidden.after
    else:
        tasks = tasks_of(nodes, rates or RATES[device_of(nodes)])
        timeline = simulate([tasks], [program_order(tasks)])
    return Schedule(name, tasks, modules, timeline.ranks[0])


def _short(name: str) -> str:
    return name.removeprefix("_c10d_functional.").removesuffix(".default")
