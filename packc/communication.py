"""The communication of a step, as :func:`packc.explain` tells it: estimated from the graphs, and not measured."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import fx

from packc.passes.overlap import Schedule, Wait, schedule

_noting: contextvars.ContextVar[list[Schedule] | None] = contextvars.ContextVar("packc_waits", default=None)


@dataclass(frozen=True)
class Communication:
    """Of a step: its graphs, those of the forward first."""

    schedules: Sequence[Schedule]

    @property
    def waits(self) -> list[Wait]:
        return [wait for each in self.schedules for wait in each.waits()]

    def save(self, path: str | Path) -> None:
        """As a timeline: a trace for Chrome's ``about:tracing`` and Perfetto (``.json``), or a picture (``.png``; it
        wants matplotlib, of the extra ``examples``)."""
        path = Path(path)
        begins = [0.0, *accumulate(each.seconds for each in self.schedules)]
        events = [event for each, begin in zip(self.schedules, begins, strict=False) for event in each.events(begin)]
        if path.suffix == ".png":
            _draw(events, path)
            return
        lanes = {0: "compute", 1: "communication"}
        names = [
            {"name": "thread_name", "ph": "M", "pid": 0, "tid": lane, "args": {"name": f"{name} (estimated)"}}
            for lane, name in lanes.items()
        ]
        path.write_text(json.dumps({"traceEvents": [*names, *events]}))

    def __str__(self) -> str:
        waits = self.waits
        exposed, total = sum(each.exposed for each in waits), sum(each.seconds for each in waits)
        lines = [f"  waits       {len(waits)} (estimated: {1e3 * total:.2f} ms, {1e3 * exposed:.2f} ms exposed)"]
        width = max((len(each.op) for each in waits), default=0)
        for each in waits:
            under = ", ".join(each.hidden_by[:3]) or "nothing"
            lines.append(
                f"    {each.graph:<8}  {each.op:<{width}}  {each.bytes / 1024:8.1f} KiB  {1e3 * each.seconds:.2f} ms, "
                f"{1e3 * each.exposed:.2f} exposed, under {under}  {each.module}".rstrip()
            )
        return "\n".join(lines)


@contextlib.contextmanager
def noting() -> Iterator[list[Schedule]]:
    """What graphs wait for that are compiled with :func:`inner` in this block."""
    found: list[Schedule] = []
    token = _noting.set(found)
    try:
        yield found
    finally:
        _noting.reset(token)


@functools.cache
def inner() -> str:
    """The inner backend that runs AOTAutograd's graphs as they are, and notes what they wait for."""
    from functorch.compile import aot_module_simplified, make_boxed_func, min_cut_rematerialization_partition

    def compiler(name: str) -> Callable[..., Any]:
        def compile_one(graph: fx.GraphModule, _: Any) -> Any:
            found = _noting.get()
            if found is not None:
                found.append(schedule(name, graph.graph))
            return make_boxed_func(graph.forward)

        return compile_one

    def explained(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        compilers = {"fw_compiler": compiler("forward"), "bw_compiler": compiler("backward")}
        return aot_module_simplified(gm, inputs, **compilers, partition_fn=min_cut_rematerialization_partition)

    torch._dynamo.register_backend(explained, name="packc_explained")
    return "packc_explained"


def _draw(events: list[dict[str, Any]], path: Path) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(12, 2.5), layout="constrained")
    colours = {"compute": "tab:blue", "exposed": "tab:red", "communication": "tab:orange"}
    for kind, colour in colours.items():
        spans = [(event["ts"] / 1e3, event["dur"] / 1e3) for event in events if _kind(event) == kind]
        lane = int(kind == "communication")
        axes.broken_barh(spans, (lane - 0.4, 0.8), facecolors=colour, edgecolor="white", linewidth=0.2, label=kind)
    axes.set_yticks([0, 1], ["compute", "communication"])
    axes.set_xlabel("ms, estimated")
    axes.legend(loc=1, ncols=3)
    figure.savefig(path)
    plt.close(figure)


def _kind(event: dict[str, Any]) -> str:
    if event["tid"] == 1:
        return "communication"
    return "exposed" if event["name"] == "wait_tensor" else "compute"
