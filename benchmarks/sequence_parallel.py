"""What sequence parallelism costs: ``python benchmarks/sequence_parallel.py``, or parts of it by name.

- bytes: received per rank and layer, counted by Linux on the sockets of gloo processes, beside the formulas, and beside
  those of Ring Attention, DeepSpeed-Ulysses and Megatron-SP for activations of the same width
- time: an op with a plan of one rank against the plain op, in interleaved pairs; CPU time of two ranks together, where
  a document spans both (by the exchange that "auto" takes, and by "all_gather") and where none does, against one
  process, and against two that know nothing of each other and have a half each, step by step beside them. A thread
  each, and a core each if there are two. "long": of four times as many tokens
- overlap: how much longer a step takes, one document on two ranks, if each of its two collectives takes 100 ms longer
- memory: bytes of tensors alive at most during a step, of a rank of four as a part of one process's
- simulate: time and memory of a 1B model of linear attention to 4096K tokens on 128 ranks, by a model of the network.
  *Simulated*: nothing of it was measured; its assumptions are the constants below
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter, process_time, thread_time
from typing import Any

import slow_link
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import packc
from packc.distributed.cost import Network, Traffic, quickest, traffic

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from live_memory import peak_bytes
from wire import received_bytes

D, STATES, HEADS, HEAD = 512, 16, 8, 64
ROUNDS = 30


def scan(tokens: int) -> tuple[Callable[..., Any], list[Tensor]]:
    """Mamba-1's, of D channels."""
    u, delta, z = torch.randn(3, 1, tokens, D).unbind()
    B, C = torch.randn(2, 1, tokens, STATES).unbind()
    A = -torch.rand(D, STATES) - 0.1
    return lambda *x, **how: packc.ops.selective_scan(*x, delta_softplus=True, **how), [
        u, delta - 2, A, B, C, torch.randn(D), z
    ]  # fmt: skip


def attention(tokens: int) -> tuple[Callable[..., Any], list[Tensor]]:
    """Linear attention with a decay per head and token: RetNet's, GLA's and SSD's."""
    q, k, v = torch.randn(3, 1, tokens, HEADS, HEAD).unbind()
    return packc.ops.linear_attention, [q, k, v, -torch.rand(1, tokens, HEADS) / 10]


def ssd(tokens: int) -> tuple[Callable[..., Any], list[Tensor]]:
    """Mamba-2's, of one group of keys."""
    x, z = torch.randn(2, 1, tokens, HEADS, HEAD).unbind()
    B, C = torch.randn(2, 1, tokens, 1, HEAD).unbind()
    return packc.ops.ssd, [x, torch.rand(1, tokens, HEADS) / 10, -torch.rand(HEADS) - 0.1, B, C, torch.randn(HEADS), z]


def convolution(tokens: int) -> tuple[Callable[..., Any], list[Tensor]]:
    return packc.ops.causal_conv1d, [torch.randn(1, tokens, D), torch.randn(D, 4), torch.randn(D)]


OPS = {"selective_scan": scan, "linear_attention": attention, "ssd": ssd, "causal_conv1d": convolution}
SIZES = {  # bytes of a transition, of a state
    "selective_scan": (4 * D, 4 * D * STATES),
    "linear_attention": (4 * HEADS, 4 * HEADS * HEAD**2),
    "ssd": (4 * HEADS, 4 * HEADS * HEAD**2),
    "causal_conv1d": (4, 4 * D * 3),
}


def main() -> None:
    parts: dict[str, Callable[[], None]] = {
        "bytes": count_bytes,
        "time": measure,
        "long": functools.partial(measure, 32768),
        "overlap": overlap,
        "memory": memory,
        "simulate": simulate,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(parts)} (default: all)")
    wanted = parser.parse_args().parts or list(parts)
    if unknown := [part for part in wanted if part not in parts]:
        parser.error(f"no part {', '.join(unknown)}: there are {', '.join(parts)}")
    for part in wanted:
        parts[part]()


# ---- bytes -----------------------------------------------------------------------------------------------------------


def count_bytes(size: int = 4) -> None:
    print(f"bytes received per rank and layer, forward and backward, W = {size}, fp32 states")
    for (name, exchange), of_tokens in run(size, _bytes)[size // 2].items():
        found = traffic(exchange, size, *SIZES[name])
        counted = ", ".join(f"{tokens}: {count}" for tokens, count in of_tokens.items())
        print(
            f"  {name:17} {exchange:11} at most {found.forward + found.backward:8}   on the wire, by tokens: {counted}"
        )
    print("the same of others, in bf16 and forward alone, by their papers' formulas, for activations of width D = 512:")
    for tokens in (64 * 1024, 1024 * 1024):
        wide = 2 * D * tokens
        ring, ulysses, megatron = 2 * wide * (size - 1) // size, 4 * wide // size, 2 * wide + 4 * wide // size
        print(f"  {tokens:8} tokens   Ring Attention {ring}   Ulysses {ulysses}   Megatron-SP {megatron}")


def _bytes(rank: int, size: int) -> dict[tuple[str, str], dict[int, int]]:
    found: dict[tuple[str, str], dict[int, int]] = {}
    for name, make in OPS.items():
        for exchange in ("all_gather", "ring", "doubling"):
            for tokens in (256, 8192):
                plan = packc.distributed.plan([0, tokens], dist.group.WORLD, exchange=exchange)
                function, inputs = make(tokens // size)
                for _ in range(2):  # connections are made in the first
                    dist.barrier()
                    before = received_bytes()
                    step(function, inputs, plan=plan)
                    count = received_bytes() - before
                found.setdefault((name, exchange), {})[tokens] = count
    return found


# ---- time ------------------------------------------------------------------------------------------------------------


def measure(tokens: int = 8192) -> None:
    print(f"{tokens} tokens, forward and backward, a thread per process, medians of {ROUNDS} interleaved steps")
    alone = run(1, _time_alone, tokens)[0]
    together = run(2, _time_together, tokens)
    for name, (plain, planned, cpu) in alone.items():
        across, gathered, apart, halves = (sum(of_rank[name][n][0] for of_rank in together) for n in range(4))
        main = [sum(of_rank[name][n][1] for of_rank in together) for n in range(4)]
        print(
            f"  {name:17} plain {1e3 * plain:6.1f} ms   W = 1 {planned / plain:5.2f}x   CPU time of two ranks: "
            f"{across / cpu:5.2f}x across, {gathered / cpu:5.2f}x by all_gather, {apart / cpu:5.2f}x apart; "
            f"of two halves {halves / cpu:5.2f}x; gloo's threads aside, "
            f"{', '.join(f'{each / main[3]:5.2f}x' for each in main[:3])} of two halves"
        )


def _time_alone(rank: int, size: int, tokens: int) -> dict[str, tuple[float, float, float]]:
    """Seconds of the plain op and of one with a plan, and CPU seconds of the former."""
    found = {}
    offsets = torch.tensor([0, tokens], dtype=torch.int32)
    plan = packc.distributed.plan([0, tokens], dist.group.WORLD)
    for name, make in OPS.items():
        function, inputs = make(tokens)
        ways = {"plain": {"cu_seqlens": offsets}, "planned": {"plan": plan}}
        times: dict[str, list[float]] = {way: [] for way in ways}
        cpu = []
        for _ in range(ROUNDS + 2):
            for way, how in ways.items():
                start, used = perf_counter(), process_time()
                step(function, inputs, **how)
                times[way].append(perf_counter() - start)
                if way == "plain":
                    cpu.append(process_time() - used)
        found[name] = median(times["plain"][2:]), median(times["planned"][2:]), median(cpu[2:])
    return found


def _time_together(rank: int, size: int, tokens: int) -> dict[str, list[tuple[float, float]]]:
    """CPU seconds of this rank, and of its main thread: with a document on both ranks, by two exchanges, with one on
    each, and of the plain op on its half."""
    _pin(rank)
    across, apart = [0, tokens], [0, tokens // 2, tokens]
    streams = (across, "auto"), (across, "all_gather"), (apart, "auto")
    plans = [packc.distributed.plan(stream, dist.group.WORLD, exchange=exchange) for stream, exchange in streams]
    ways: list[dict[str, Any]] = [
        *({"plan": plan} for plan in plans),
        {"cu_seqlens": torch.tensor([0, tokens // size])},
    ]
    found = {}
    for name, make in OPS.items():
        function, inputs = make(tokens // size)
        times: list[list[tuple[float, float]]] = [[] for _ in ways]
        for _ in range(ROUNDS + 2):
            for how, of_way in zip(ways, times, strict=True):
                dist.barrier()
                used, of_main = process_time(), thread_time()
                step(function, inputs, **how)
                of_way.append((process_time() - used, thread_time() - of_main))
        found[name] = [tuple(map(median, zip(*each[2:], strict=True))) for each in times]
    return found


# ---- overlap ---------------------------------------------------------------------------------------------------------

LATENCY = 0.1
# Tokens: with enough work for the longer collectives, in the forward alone too.
OF_RANK = {"selective_scan": 16384, "linear_attention": 65536, "ssd": 65536, "causal_conv1d": 524288}
COMPILED = ("linear_attention",)


def overlap(rounds: int = 5) -> None:
    print(f"a step of an op on two ranks, one document, all_gather; medians of {rounds} interleaved steps")
    ranks = run(2, _overlap, rounds, backend="slow")
    for name, (seconds, *_) in ranks[0].items():
        # Of the rank that waits the longer: with a document on both, one each way.
        waited = [sum(of_rank[name][1][latency] for of_rank in ranks) for latency in (0.0, LATENCY)]
        exposed = (waited[1] - waited[0]) / (2 * LATENCY * len(ranks))
        print(
            f"  {name:26} {1e3 * seconds:6.0f} ms of CPU a step; all ranks wait {1e3 * waited[0]:4.0f} ms, "
            f"with {1e3 * LATENCY:.0f} ms more a collective {1e3 * waited[1]:4.0f} ms: {exposed:4.0%} of it exposed"
        )


def _overlap(rank: int, size: int, rounds: int) -> dict[str, tuple[float, dict[float, float]]]:
    """CPU seconds of a step, and seconds that this rank stood waiting, by latency."""
    _pin(rank)
    group: Any = dist.group.WORLD
    found = {}
    for name, make in OPS.items():
        tokens = OF_RANK[name]
        plan = packc.distributed.plan([0, size * tokens], group, exchange="all_gather")
        plain, inputs = make(tokens)
        ways = {name: plain}
        if name in COMPILED:
            ways[f"{name}, compiled"] = torch.compile(plain, backend=packc.backend)
        for way, function in ways.items():
            waited: dict[float, list[float]] = {0.0: [], LATENCY: []}
            used = []
            for _ in range(rounds + 1):
                for latency, of_latency in waited.items():
                    group.latency = latency
                    dist.barrier()
                    group.waited, before = 0.0, process_time()
                    step(function, inputs, plan=plan)
                    of_latency.append(group.waited)
                    used.append(process_time() - before)
            found[way] = median(used[2:]), {latency: median(each[1:]) for latency, each in waited.items()}
    return found


# ---- memory ----------------------------------------------------------------------------------------------------------


def memory(tokens: int = 8192, size: int = 4) -> None:
    print(f"bytes alive at most in a step of {tokens} tokens, beside its inputs; of a rank of {size}, of all")
    streams = {"one document": [0, tokens], "64 documents": [*range(0, tokens + 1, tokens // 64)]}
    alone = run(1, _memory, tokens, streams)[0]
    together = run(size, _memory, tokens, streams)
    for (name, of), whole in alone.items():
        most = max(of_rank[name, of] for of_rank in together)
        print(f"  {name:17} {of:13} {whole / 1e6:6.1f} MB, a rank at most {most / 1e6:6.1f} MB: {most / whole:5.1%}")


def _memory(rank: int, size: int, tokens: int, streams: dict[str, list[int]]) -> dict[tuple[str, str], int]:
    found = {}
    for of, stream in streams.items():
        plan = packc.distributed.plan(stream, dist.group.WORLD, exchange="all_gather")
        for name, make in OPS.items():
            function, inputs = make(tokens // size)
            step(function, inputs, plan=plan)
            found[name, of] = peak_bytes(functools.partial(step, function, inputs, plan=plan))
    return found


def _pin(rank: int) -> None:
    """To a core of its own, if there are as many."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, [cores[rank % len(cores)]])


def step(function: Callable[..., Any], inputs: list[Tensor], **how: Any) -> None:
    leaves = [x.requires_grad_() for x in inputs]
    out = function(*leaves, **how)
    torch.autograd.grad(out, leaves, out.detach())


# ---- processes -------------------------------------------------------------------------------------------------------


def run(size: int, work: Callable[..., Any], *args: Any, backend: str = "gloo") -> list[Any]:
    """What ``work(rank, size, *args)`` returned on each rank. What a process has freed stays with it: which step it has
    pages to fault in again would be chance, and a quarter of a step."""
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_enter, (size, work, folder, backend, args), nprocs=size)
        return [torch.load(f"{folder}/{rank}.pt") for rank in range(size)]


def _enter(rank: int, size: int, work: Callable[..., Any], folder: str, backend: str, args: tuple[Any, ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    slow_link.register(LATENCY)
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=size)
    torch.save(work(rank, size, *args), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


# ---- a model of a cluster --------------------------------------------------------------------------------------------

# 1B parameters: 16 layers of width 2048 with 16 heads of 128, a vocabulary of 64K, as TransNormerLLM-1B.
LAYERS, WIDTH, OF_HEADS, OF_HEAD, PARAMETERS = 16, 2048, 16, 128, 1e9
PEAK, USED = 312e12, 0.45  # A100, bf16: FLOP/s, and what of it a training step uses
MEMORY = 80e9
OF_PARAMETER = 16  # bytes of weight, gradient and Adam's state, sharded over all ranks as FSDP does
OF_TOKEN = 34 * WIDTH * LAYERS * 2 // 2  # bytes of activations: 17 values of bf16 a token, channel and layer
NETWORK = Network(start=30e-6, hop=10e-6, bandwidth=20e9)


def simulate() -> None:
    print("SIMULATED, not measured: a 1B linear-attention model, A100-80G, FSDP, a sequence over all ranks")
    print(f"  {'ranks':>5} {'tokens':>9} {'memory':>9} {'step':>9} {'tokens/s':>9}  {'states':>9}  by")
    state, transition = 4 * OF_HEADS * OF_HEAD**2, 4 * OF_HEADS
    for ranks in (16, 32, 64, 128):
        for tokens in (2**k * 1024 for k in range(7, 13)):
            of_rank = tokens / ranks
            memory = OF_PARAMETER * PARAMETERS / ranks + OF_TOKEN * of_rank + 2 * PARAMETERS / LAYERS
            compute = 6 * PARAMETERS * of_rank / (PEAK * USED)
            exchange = quickest(ranks, transition, state, near=False, network=NETWORK)
            sent: Traffic = traffic(exchange, ranks, transition, state)
            states = LAYERS * sent.seconds(NETWORK)
            weights = 3 * 2 * PARAMETERS / NETWORK.bandwidth  # two gathers and a scatter, half of them under compute
            seconds = max(compute, weights / 2) + weights / 2 + states
            shown = f"{memory / 1e9:6.1f} GB" if memory < MEMORY else "      OOM"
            speed = f"{seconds:8.2f}s {tokens / seconds:9.0f}" if memory < MEMORY else f"{'':19}"
            print(f"  {ranks:5} {tokens // 1024:8}K {shown:>9} {speed}  {1e3 * states:7.1f}ms  {exchange}")


if __name__ == "__main__":
    main()
