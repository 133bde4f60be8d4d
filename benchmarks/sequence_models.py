"""What ``packc.sequence`` costs whole models.

    python benchmarks/sequence_models.py [compile] [memory] [bytes] [time] [overlap]

A stock Mamba-2 and a stock hybrid, of random weights, on gloo processes of this machine with a thread each, beside
packc in one process:

- compile: CPU time of the first step, code generation and its C++ compiler included, of a rank of two
- memory: what a step's tensors take at most, weights and their gradients left out, on each of four ranks
- bytes: received per rank and layer of the Mamba-2, counted by Linux on the sockets, beside the formula
- time: CPU time of a step, of two ranks together
- overlap: seconds of a step of two ranks, a core each, if every collective takes 100 ms longer than gloo's: measured,
  and simulated beforehand from the order that packc gave Inductor's graphs and a step's time without those 100 ms.
  Needs a machine that does nothing else. And how long ranks stand waiting more than without those 100 ms, as a share
  of them: what is exposed of communication

``--inner aot_eager`` leaves code generation out; ``--tokens`` are those of the batch, ``--width`` and ``--layers`` the
model's.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple
from unittest import mock

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import torch
import torch.distributed as dist
from families import FAMILIES, build
from sequence_parallel import LATENCY, run
from torch import Tensor, fx

from packc.distributed.ranks import check_that_all_agree
from packc.passes.overlap import Task, inductor_pass, program_order, simulate
from packc.passes.overlap.costs import RATES
from packc.passes.overlap.hide_communication import hide_communication, tasks_of
from packc.passes.overlap.tasks import total

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from wire import received_bytes

MODELS = ("mamba2", "bamba")


class Model(NamedTuple):
    name: str
    width: int
    layers: int


def main() -> None:
    parts = {"compile": compiling, "memory": memory, "bytes": wire, "time": cpu_time, "overlap": overlap}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=", ".join(parts))
    parser.add_argument("--inner", default="inductor")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=list(FAMILIES))
    options = parser.parse_args()
    options.models = [Model(name, options.width, options.layers) for name in options.models]
    for part in options.parts or parts:
        parts[part](options)


def batch(tokens: int) -> dict[str, Tensor]:
    """Four documents, the longest of half of the tokens, padded to it."""
    lengths = torch.tensor([[tokens // 2], [tokens // 4], [tokens // 8], [tokens // 8]])
    mask = (torch.arange(tokens // 2) < lengths).long()
    ids = torch.randint(1, 512, mask.shape, generator=torch.Generator().manual_seed(0)) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def stepper(of: Model, inner: str, size: int) -> tuple[torch.nn.Module, Callable[[dict[str, Tensor]], None]]:
    """The model, and a step of it; over the ranks, if there are several, with outputs that stay on them."""
    torch.manual_seed(0)
    model = build(*of)
    over_ranks = {"packc.sequence": dist.group.WORLD, "packc.sequence_outputs": "local"} if size > 1 else {}
    compiled = torch.compile(model, backend="packc", options={"packc.inner": inner, **over_ranks})

    def step(given: dict[str, Tensor]) -> None:
        model.zero_grad()
        compiled(**given).loss.backward()

    return model, step


def cpu_seconds() -> float:
    """Of this process and of those it has waited for."""
    return sum(os.times()[:4])


def compiling(options: argparse.Namespace) -> None:
    for model in options.models:
        alone, *_ = run(1, _compile, model, options.inner)
        ranks = run(2, _compile, model, options.inner)
        print(f"compile {model.name:8} packed {alone:6.1f} s CPU   a rank of two {ranks[0]:6.1f} s ", end="")
        print(f"({ranks[0] / alone:.2f}x)")


def _compile(_: int, size: int, model: Model, inner: str) -> float:
    _, step = stepper(model, inner, size)
    before = cpu_seconds()
    step(batch(256))
    return cpu_seconds() - before


def memory(options: argparse.Namespace) -> None:
    for model in options.models:
        alone, *_ = run(1, _peak, model, options.inner, options.tokens)
        ranks = run(4, _peak, model, options.inner, options.tokens)
        shares = ", ".join(f"{each / 2**20:.0f} ({each / alone:.2f})" for each in ranks)
        print(
            f"memory {model.name:8} {options.tokens} tokens   packed {alone / 2**20:.0f} MiB   ranks of four {shares}"
        )


def _peak(_: int, size: int, model: Model, inner: str, tokens: int) -> int:
    module, step = stepper(model, inner, size)
    given = batch(tokens)
    step(given)
    module.zero_grad()
    with torch.profiler.profile(profile_memory=True) as profile:
        step(given)
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most - sum(p.numel() * p.element_size() for p in module.parameters())


def wire(options: argparse.Namespace) -> None:
    size, lengths = 4, (options.tokens // 16, options.tokens)
    model = Model("mamba2", options.width, options.layers)
    ranks = run(size, _received, model, options.inner, lengths)
    config = build(*model).config
    channels = config.num_heads * config.head_dim
    convolution = 4 * (channels + 2 * config.n_groups * config.state_size) * (config.conv_kernel - 1)
    state, transition = 4 * channels * config.state_size, 4 * config.num_heads
    formula = (size - 1) * (2 * convolution + 4 + 2 * state + transition)
    print(f"bytes mamba2, W = {size}, received per rank and layer, forward and backward: formula {formula}")
    for n, tokens in enumerate(lengths):
        print(f"  {tokens} tokens: {max(each[n] for each in ranks) / model.layers:.0f} on the wire")


def _received(_: int, size: int, model: Model, inner: str, lengths: tuple[int, ...]) -> list[int]:
    _, step = stepper(model, inner, size)
    found = []
    for tokens in lengths:
        for _ in range(2):  # the first compiles, and makes connections
            dist.barrier()
            before = received_bytes()
            step(batch(tokens))
            dist.barrier()
            count = received_bytes() - before
        found.append(count)
    return found


def cpu_time(options: argparse.Namespace) -> None:
    for model in options.models:
        alone, *_ = run(1, _seconds, model, options.inner, options.tokens)
        together = sum(run(2, _seconds, model, options.inner, options.tokens))
        print(
            f"time {model.name:8} {options.tokens} tokens   packed {alone:.2f} s CPU   two ranks {together:.2f} s ",
            end="",
        )
        print(f"({together / alone:.2f}x)")


def _seconds(_: int, size: int, model: Model, inner: str, tokens: int, rounds: int = 5) -> float:
    _, step = stepper(model, inner, size)
    given = batch(tokens)
    step(given)
    seconds = []
    for _ in range(rounds):
        dist.barrier()
        before = sum(os.times()[:2])
        step(given)
        seconds.append(sum(os.times()[:2]) - before)
    return median(seconds)


def overlap(options: argparse.Namespace) -> None:
    for model in options.models:
        ranks = run(2, _steps, model, options.tokens, backend="slow")
        (usual, once, _), (slow, collective, _), found = ranks[0]
        graphs = [[Task(*each) for each in graph] for graph in found]
        scale = (usual - once) / sum(total(tasks, "compute") for tasks in graphs)
        graphs = [[_scaled(task, scale, collective) for task in tasks] for tasks in graphs]
        timelines = [simulate([tasks], [program_order(tasks)]) for tasks in graphs]
        predicted = collective + sum(each.seconds for each in timelines)
        count = sum(task.kind == "start" for tasks in graphs for task in tasks)
        print(f"overlap {model.name:8} {options.tokens} tokens, {count} collectives of {collective:.3f} s")
        print(f"  a step by gloo as it is {usual:.2f} s, and {LATENCY * (count + 1):.2f} s if none is hidden")
        print(f"  measured {slow:.2f} s   simulated {predicted:.2f} s ({predicted / slow - 1:+.0%})")
        waited = sum(with_latency[2] - without[2] for without, with_latency, _ in ranks) / len(ranks)
        # Nothing can hide that of the comparison, with which a step begins.
        exposed, inside = waited / LATENCY / (count + 1), (waited / LATENCY - 1) / count
        print(f"  a rank waits {waited:.2f} s more: {exposed:.0%} exposed, {inside:.0%} of the graphs' own")


def _scaled(task: Task, scale: float, collective: float) -> Task:
    return replace(task, seconds={"compute": scale * task.seconds, "start": collective}.get(task.kind, 0.0))


def _steps(rank: int, size: int, model: Model, tokens: int, rounds: int = 3) -> list[Any]:
    """Seconds of a step, of the comparison of a batch, which nothing hides, and that a step stood waiting, by gloo as
    it is; the same by a slow link; and the tasks of the graphs, forward and backward, as Inductor runs them."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {rank % (os.cpu_count() or 1)})
    graphs: list[list[Any]] = []

    def noting(graph: fx.Graph) -> None:
        hide_communication(graph)
        nodes = [node for node in graph.nodes if node.op == "call_function"]
        graphs.append([astuple(task) for task in tasks_of(nodes, RATES["cpu"])])

    link: Any = dist.group.WORLD
    found: list[Any] = []
    with mock.patch.object(inductor_pass, "hide_communication", noting):
        _, step = stepper(model, "inductor", size)
        given = batch(tokens)
        step(given)
    times: dict[float, list[list[float]]] = {0.0: [], LATENCY: []}
    for _ in range(rounds):
        for link.latency, of_latency in times.items():
            comparing = _seconds_of(_compare)
            link.waited = 0.0
            of_latency.append([_seconds_of(lambda: step(given)), comparing, link.waited])
    found += [tuple(map(median, zip(*of_latency, strict=True))) for of_latency in times.values()]
    return [*found, graphs]


def _compare() -> None:
    check_that_all_agree(dist.group.WORLD, "ranks", "")


def _seconds_of(call: Callable[[], None]) -> float:
    dist.barrier()
    began = perf_counter()
    call()
    dist.barrier()
    return perf_counter() - began


if __name__ == "__main__":
    main()
