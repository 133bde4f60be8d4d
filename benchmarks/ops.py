"""The ops against memory traffic and arithmetic that anyone can run: ``python benchmarks/ops.py``.

Every row is measured in this one run, contenders taking turns, and shows the median and the best time, each with its
ratio to that of the first row. (With other work on the machine the medians of parallel code show the scheduler; the
best times still show the code.) Large fresh outputs cost page faults that dwarf a kernel, so the process re-execs
itself once with the allocator told to keep its memory (``ALLOCATOR`` below): the same for every contender.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch

ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}

Contenders = dict[str, Callable[[], object]]


def causal_conv1d(T: int, D: int) -> Contenders:
    """W = 4 with bias and SiLU; the baseline copies the input into a tensor that exists already."""
    from packc.ops import causal_conv1d as conv

    W = 4
    x, out, dout = torch.randn(1, T, D), torch.empty(1, T, D), torch.randn(1, T, D)
    weight, bias = torch.randn(D, W), torch.randn(D)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    projection = torch.randn(1, T, 2 * D)[..., :D]
    channel_first = torch.randn(1, D, T).transpose(1, 2)
    documents = torch.arange(0, T + 1, 64, dtype=torch.int32)
    tokens = torch.arange(T + 1, dtype=torch.int32)

    def forward_backward() -> object:
        result = conv(*leaves, activation="silu")
        return torch.autograd.grad(result, leaves, dout)

    return {
        "copy_ of x": lambda: out.copy_(x),
        "forward": lambda: conv(x, weight, bias, activation="silu"),
        "forward, rows of a projection": lambda: conv(projection, weight, bias, activation="silu"),
        "forward, channel-first memory": lambda: conv(channel_first, weight, bias, activation="silu"),
        "forward, documents of 64": lambda: conv(x, weight, bias, activation="silu", cu_seqlens=documents),
        "forward, documents of 1": lambda: conv(x, weight, bias, activation="silu", cu_seqlens=tokens),
        "forward + backward": forward_backward,
    }


def selective_scan(T: int, D: int) -> Contenders:
    """N = 16; the baseline is the exponential of a (T, D, N) tensor into one that exists already.

    As a model calls it: softplus, bias, skip connection and gate; delta in channel-first memory, the others slices of
    token-major projections.
    """
    from packc.ops import selective_scan as scan

    N, rank = 16, 32
    states, exponentials = torch.randn(T, D, N), torch.empty(T, D, N)
    u, dout = torch.randn(1, T, D), torch.randn(1, T, D)
    delta, channel_first = torch.rand(1, T, D), torch.randn(1, D, T).transpose(1, 2)
    A = -torch.arange(1, N + 1).float().repeat(D, 1)
    z = torch.randn(1, T, 2 * D)[..., D:]
    B, C = torch.randn(1, T, rank + 2 * N)[..., rank:].chunk(2, -1)
    bare = (u, delta, A, B.contiguous(), C.contiguous())
    model = (u, channel_first, A, B, C, torch.ones(D), z, torch.randn(D) - 4)
    lengths = torch.randint(1, 65, (64,), generator=torch.Generator().manual_seed(0)).cumsum(0)
    documents = torch.cat([torch.zeros(1, dtype=torch.long), lengths[lengths < T], torch.tensor([T])])

    def forward_backward(inputs: tuple[torch.Tensor, ...], softplus: bool, cu_seqlens: torch.Tensor | None = None):
        leaves = [x.detach().requires_grad_() for x in inputs]
        return lambda: torch.autograd.grad(scan(*leaves, delta_softplus=softplus, cu_seqlens=cu_seqlens), leaves, dout)

    return {
        "exp of (T, D, N)": lambda: torch.exp(states, out=exponentials),
        "forward, bare": lambda: scan(*bare),
        "forward, as a model calls it": lambda: scan(*model, delta_softplus=True),
        "forward, documents of 1-64": lambda: scan(*model, delta_softplus=True, cu_seqlens=documents),
        "forward + backward, bare": forward_backward(bare, False),
        "forward + backward, as a model": forward_backward(model, True),
        "forward + backward, docs of 1-64": forward_backward(model, True, documents),
    }


SECTIONS: dict[str, Callable[[int, int], Contenders]] = {
    "causal_conv1d": causal_conv1d,
    "selective_scan": selective_scan,
}


def measure(contenders: Contenders, rounds: int) -> dict[str, tuple[float, float]]:
    """Milliseconds, median and best. Contenders take turns, so that a disturbance of the machine meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round in range(rounds + 3):
        for name, run in contenders.items():
            begin = time.perf_counter()
            run()
            if round >= 3:
                times[name].append((time.perf_counter() - begin) * 1e3)
    return {name: (statistics.median(values), min(values)) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=f"some of: {', '.join(SECTIONS)} (all)")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--threads", type=int, help="torch's own choice without it")
    args = parser.parse_args()
    for name in args.sections:
        if name not in SECTIONS:
            parser.error(f"no section {name!r}")

    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    print("allocator:", *(f"{name}={value}" for name, value in ALLOCATOR.items()))
    for name in args.sections or SECTIONS:
        contenders = SECTIONS[name](args.tokens, args.channels)
        print(f"\n{name}: {args.tokens} tokens, {args.channels} channels, fp32, {args.rounds} rounds")
        times = measure(contenders, args.rounds)
        median_base, best_base = next(iter(times.values()))
        print(f"  {'':36} {'median':>9} {'ratio':>11} {'best':>12} {'ratio':>11}")
        for contender, (median, best) in times.items():
            print(
                f"  {contender:36} {median:9.3f} ms {median / median_base:8.2f} x"
                f" {best:9.3f} ms {best / best_base:8.2f} x"
            )


if __name__ == "__main__":
    main()
