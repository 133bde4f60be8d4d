"""Where the time of one packed step goes, and what the host needs for a call of each op.

The profiler's table is ``profile.txt``. A call's time on the host is that of small inputs, many calls in a row and none
waited for: what a GPU has to be kept busy for meanwhile.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import cases
import torch
from launches import instead_of_launch
from models import MODELS, TINY, model_and_documents
from packmamba import steps_of
from telling import each, parser, synchronize

import packc

CALLS = 30


def main() -> None:
    args = parser(__doc__).parse_args()

    def facts_of(name: str) -> dict[str, Any]:
        return profiled(args.dry) if name == "step" else host_times(args.dry)

    each(args, ["host", "step"], facts_of)


def host_times(dry: bool) -> dict[str, Any]:
    microseconds, launches = {}, {}
    for op in cases.OPS:
        inputs = cases.make(cases.Case(op, "bf16", "packed"), [5, 65], dry)
        launches[op] = _launches(inputs)
        for _ in range(3):
            inputs.results()
        synchronize()
        began = time.perf_counter()
        for _ in range(CALLS):
            inputs.results()
        microseconds[op] = round((time.perf_counter() - began) / CALLS * 1e6)
        synchronize()
    shown = ", ".join(f"{op} {x}/{launches[op]}" for op, x in microseconds.items())
    return {"host_us": microseconds, "launches": launches, "line": f"host, us/launches a forward and backward: {shown}"}


def _launches(inputs: cases.Inputs) -> int:
    kernels: list[Any] = []

    def count(launch: Any, kernel: Any, grid: Any, **arguments: Any) -> None:
        kernels.append(kernel)
        launch(kernel, grid, **arguments)

    with instead_of_launch(count):
        inputs.results()
    return len(kernels)


def profiled(dry: bool) -> dict[str, Any]:
    from torch.profiler import ProfilerActivity, profile

    name = next(iter(TINY if dry else MODELS))
    model, documents = model_and_documents(name, dry)
    inner = "aot_eager" if dry else "inductor"
    step = steps_of(torch.compile(model, backend=packc.backend, options={"packc.inner": inner}), documents)["packed"]
    for _ in range(2):
        step()
        model.zero_grad()
    synchronize()
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (not dry)) as profiler:
        step()
        synchronize()
    averages = profiler.key_averages()
    table = averages.table(sort_by="self_cpu_time_total" if dry else "self_device_time_total", row_limit=60)
    if out := os.environ.get("PACKC_GPU_OUT"):
        (Path(out) / "profile.txt").write_text(table)
    launches = sum(event.count for event in averages if "LaunchKernel" in event.key)
    return {"model": name, "launches": launches, "host_ms": sum(e.self_cpu_time_total for e in averages) / 1e3}


if __name__ == "__main__":
    main()
