"""Communication hidden under compute: measured on two processes with a slow link, and simulated.

``python benchmarks/overlap.py`` runs a step on two processes of this machine, a core and a thread each, under Inductor
as it comes and under packc. Each layer of the step sums its tokens, gathers the sums of both ranks and adds a
correction made of them, after products that do not need them. Every collective takes ``--latency`` seconds longer than
gloo (slow_link.py). Beside what was measured stands what the schedule's simulator says of the same step, from measured
times of products and of a collective.

Then, *simulated* alone, the case of Optimus (arXiv 2408.03505): an encoder whose kernels fill the bubbles that the
collectives of a language model leave, whole (coarse) and kernel by kernel (fine).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import slow_link
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from torch import Tensor

import packc
from packc.passes.overlap import Task, early_and_late, list_schedule, program_order, simulate
from packc.passes.overlap.policies import coarse, fine

RANKS = 2
DIM = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=0.1, help="seconds that the link adds (%(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="each with one collective (%(default)s)")
    parser.add_argument("--tokens", type=int, default=2000, help="of a rank (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="steps of which the median is taken (%(default)s)")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as folder, console.status("two processes"):
        mp.start_processes(_work, (Path(folder), vars(options)), nprocs=RANKS, start_method="spawn")
        measured = json.loads((Path(folder) / "0.json").read_text())
    simulated = predicted(options.layers, measured["products"], measured["collective"])
    table = Table(title=f"a step, ms: {options.layers} collectives of {1e3 * options.latency:.0f} ms more than gloo's")
    for column in ("", "measured", "simulated"):
        table.add_column(column)
    for name in ("Inductor", "packc"):
        table.add_row(name, *(f"{1e3 * each[name]:.0f}" for each in (measured, simulated)))
    exposed = measured["packc"] - measured["alone"]
    table.add_row("without collectives", f"{1e3 * measured['alone']:.0f}", f"{1e3 * simulated['alone']:.0f}")
    console.print(table)
    share = exposed / (options.layers * measured["collective"])
    console.print(f"exposed under packc: {1e3 * exposed:.0f} ms, {share:.0%} of all communication")
    bubbles = optimus(console)
    if options.output:
        options.output.write_text(json.dumps({"measured": measured, "simulated": simulated, "bubbles": bubbles}))


def _work(rank: int, folder: Path, options: dict[str, Any]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {rank % (os.cpu_count() or 1)})
    slow_link.register(options["latency"])
    dist.init_process_group("slow", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    x = torch.randn(options["tokens"], DIM) / DIM**0.5
    weights = [torch.randn(DIM, DIM) / DIM**0.5 for _ in range(3 * options["layers"])]
    group = dist.group.WORLD
    step, alone = _step(group.group_name), _step(None)  # type: ignore[union-attr]
    found = {}
    contenders = {"Inductor": (step, {}), "packc": (step, {"backend": packc.backend}), "alone": (alone, {})}
    for name, (function, how) in contenders.items():
        torch._dynamo.reset()
        compiled = torch.compile(function, **how)
        found[name] = _median(lambda compiled=compiled: compiled(x, weights), options["rounds"], group)
    found["products"] = _median(lambda: _inside(x, weights[:3]), options["rounds"], group)
    found["collective"] = _median(lambda: _gather(x[:1], group.group_name), options["rounds"], group)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _median(run: Callable[[], Any], rounds: int, group: Any) -> float:
    run()
    times = []
    for _ in range(rounds):
        dist.barrier(group)
        began = perf_counter()
        run()
        times.append(perf_counter() - began)
    return median(times)


def _gather(x: Tensor, name: str) -> Tensor:
    gathered = torch.ops._c10d_functional.all_gather_into_tensor(x, RANKS, name)
    return torch.ops._c10d_functional.wait_tensor(gathered)


def _inside(x: Tensor, weights: list[Tensor]) -> Tensor:
    for w in weights:
        x = (x @ w).relu()
    return x


def _step(group: str | None) -> Callable[[Tensor, list[Tensor]], Tensor]:
    def step(x: Tensor, weights: list[Tensor]) -> Tensor:
        for layer in range(0, len(weights), 3):
            sums = x.sum(0, keepdim=True)
            correction = (sums if group is None else _gather(sums, group)).sum(0)
            x = _inside(x, weights[layer : layer + 3]) + 1e-3 * correction
        return x

    return step


def predicted(layers: int, products: float, collective: float) -> dict[str, float]:
    tasks: list[Task] = []
    for _ in range(layers):
        at, last = len(tasks), (len(tasks) - 1,) if tasks else ()
        tasks += [
            Task("gather", collective, last, "start"),
            Task("wait", 0, (at,), "wait"),
            Task("products", products, last),
            Task("correction", 0, (at + 1, at + 2)),
        ]
    orders = {"Inductor": program_order(tasks), "packc": list_schedule(tasks)}
    return {name: simulate([tasks], [order]).seconds for name, order in orders.items()} | {"alone": layers * products}


def optimus(console: Console) -> dict[str, float]:
    """A step of a language model whose layers gather and reduce under tensor parallelism, with an encoder beside it.

    Times in units of a layer's compute: a layer's collective takes 0.4 of it, the gather of weights before the first
    layer and the reduction of gradients behind the last 2 each, the encoder's 24 kernels 0.25 each.
    """
    encoder = [Task(f"encoder {n}", 0.25, (n - 1,) if n else ()) for n in range(24)]
    model: list[Task] = []
    last: tuple[int, ...] = ()

    def exchange(name: str, seconds: float) -> None:
        nonlocal last
        at = len(encoder) + len(model)
        model.extend([Task(name, seconds, last, "start"), Task("wait", 0, (at,), "wait")])
        last = (at + 1,)

    exchange("gather weights", 2.0)
    for layer in range(8):
        model.append(Task(f"layer {layer}", 1.0, last))
        last = (len(encoder) + len(model) - 1,)
        exchange(f"reduce {layer}", 0.4)
    exchange("reduce gradients", 2.0)
    tasks = [*encoder, *model, Task("join", 0.0, (len(encoder) - 1, *last))]
    branch = range(len(encoder))
    orders = {
        "program order": program_order(tasks),
        "early and late": early_and_late(tasks),
        "Optimus, coarse": coarse(tasks, branch),
        "Optimus, fine": fine(tasks, branch),
        "list scheduling": list_schedule(tasks),
    }
    table = Table(title="simulated: an encoder in the bubbles of a language model")
    for column in ("order", "step", "idle", "of program order"):
        table.add_column(column)
    seconds = {}
    usual = simulate([tasks], [orders["program order"]]).seconds
    for name, order in orders.items():
        timeline = simulate([tasks], [order])
        seconds[name] = timeline.seconds
        idle = f"{timeline.exposed[0] / timeline.seconds:.0%}"
        table.add_row(name, f"{timeline.seconds:.2f}", idle, f"{timeline.seconds / usual:.2f}")
    console.print(table)
    return seconds


if __name__ == "__main__":
    main()
