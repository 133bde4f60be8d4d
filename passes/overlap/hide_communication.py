"""A graph in the order in which its collectives are hidden best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import fx

from packc.passes.overlap.costs import RATES, Rates, bytes_of, device_of, seconds_of, seconds_of_collective
from packc.passes.overlap.policies import list_schedule, program_order
from packc.passes.overlap.tasks import Task
from packc.passes.overlap.timeline import Timeline, peak, simulate

_WAIT = "wait_tensor"
MORE_MEMORY = 0.05
"""Of what the graph's values take at most, how much more they may: what is exchanged lives beside what hides it."""


class Hidden(NamedTuple):
    """What reordering did to a graph, by its cost model."""

    tasks: Sequence[Task]
    before: Timeline
    after: Timeline


def is_collective(node: fx.Node) -> bool:
    """Whether a node starts one that is waited for by another node."""
    return _namespace(node) == "_c10d_functional" and not is_wait(node)


def is_wait(node: fx.Node) -> bool:
    return _namespace(node) == "_c10d_functional" and node.target._opname == _WAIT  # type: ignore[union-attr]


def _namespace(node: fx.Node) -> str:
    return node.target.namespace if isinstance(node.target, torch._ops.OpOverload) else ""


def hide_communication(graph: fx.Graph, rates: Rates | None = None) -> Hidden | None:
    """Reorder ``graph`` in place so that its collectives start early, are waited for late, and other work runs between.

    The order depends on the graph and on ``rates`` alone, so all ranks find the same. What writes in place stays where
    it is among what reads. None where there is no collective, or nothing to gain.
    """
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    if not any(map(is_collective, nodes)):
        return None
    tasks = tasks_of(nodes, rates or RATES[device_of(nodes)])
    limit = int(peak(tasks, program_order(tasks)) * (1 + MORE_MEMORY))
    order = list_schedule(tasks, limit)
    if order == program_order(tasks):
        return None
    place = next((node for node in reversed(graph.nodes) if node.op in ("placeholder", "get_attr")), graph._root)
    for number in order:
        place.append(nodes[number])
        place = nodes[number]
    graph.lint()
    return Hidden(tasks, *(simulate([tasks], [each]) for each in (program_order(tasks), order)))


def tasks_of(nodes: Sequence[fx.Node], rates: Rates) -> list[Task]:
    numbers = {node: number for number, node in enumerate(nodes)}
    tasks: list[Task] = []
    barrier: int | None = None  # the last that must stay behind all before it
    for number, node in enumerate(nodes):
        after = {numbers[each] for each in node.all_input_nodes if each in numbers}
        if _stays(node):
            after, barrier = set(range(number)), number
        elif barrier is not None:
            after.add(barrier)
        name, before = str(node.target), tuple(sorted(after))
        if is_collective(node):
            tasks.append(Task(name, seconds_of_collective(node, rates), before, "start", bytes_of(node)))
        elif is_wait(node) and any(tasks[each].kind == "start" for each in before):
            tasks.append(Task(name, 0.0, before, "wait"))
        else:
            tasks.append(Task(name, seconds_of(node, rates), before, "compute", bytes_of(node)))
    return tasks


def _stays(node: fx.Node) -> bool:
    """Whether a node does more than to make its result: writes in place, draws random numbers, or raises."""
    if is_collective(node) or is_wait(node):
        return False
    if not isinstance(node.target, torch._ops.OpOverload):
        return False  # Python's functions of sizes
    return node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags or node.is_impure()
