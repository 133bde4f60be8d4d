"""The ops against memory traffic, arithmetic and peers that anyone can run: ``python benchmarks/ops.py``.

Every row is measured in this one run and shows the median and the best time, each with its ratio to that of its op's
first row. On the CPU contenders take turns. (With other work on the machine the medians of parallel code show the
scheduler; the best times still show the code.) Large fresh outputs cost page faults that dwarf a kernel, so the process
re-execs itself once with the allocator told to keep its memory (``ALLOCATOR`` below): the same for every contender.

On a GPU every row also shows the share it reaches of two roofs, measured in the same run: of the rate at which a copy
moves memory, and of the rate at which a kernel that does nothing else takes exponentials. Peers are measured where they
are installed: mamba_ssm, causal_conv1d, flash-linear-attention.

Writes ``ops-<device>.csv`` and ``.png``.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from mixer_contenders import SECTIONS as MIXERS
from op_contenders import SECTIONS as OTHERS
from op_contenders import Contender, Problem
from rich.progress import track
from summary_contenders import SECTIONS as SUMMARIES

ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}
RESULTS = Path(__file__).parent / "results"
SECTIONS = OTHERS | MIXERS | SUMMARIES
TOKENS = {"cpu": [2048], "cuda": [2048, 8192, 32768, 131072]}
TOKENS_OF_MIXERS = {"cpu": [4096], "cuda": TOKENS["cuda"]}
CHANNELS = {"cpu": [512], "cuda": [1536, 2560, 5120]}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WARM_UP = 3  # rounds


class Row(NamedTuple):
    op: str
    tokens: int
    channels: int
    dtype: str
    contender: str
    median_ms: float
    best_ms: float
    median_ratio: float
    best_ratio: float
    memory_roof: float | None  # share reached
    exponential_roof: float | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=f"some of: {', '.join(SECTIONS)} (all)")
    parser.add_argument("--device", choices=list(TOKENS), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--tokens", type=int, nargs="+", help="2048, or 4096 of mixers; on a GPU 2048, 8192, 32768 and 131072"
    )
    parser.add_argument("--channels", type=int, nargs="+", help="512; on a GPU 1536, 2560 and 5120")
    parser.add_argument("--dtype", choices=list(DTYPES), help="fp32; on a GPU bf16")
    parser.add_argument("--rounds", type=int, default=30, help="times that each contender runs, on the CPU")
    parser.add_argument("--threads", type=int, help="torch's own choice without it")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the CSV and the plot")
    args = parser.parse_args()
    for name in args.sections:
        if name not in SECTIONS:
            parser.error(f"no section {name!r}: choose from {', '.join(SECTIONS)}")
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no GPU")

    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})
    if args.threads:
        torch.set_num_threads(args.threads)
    print(machine(device))
    print("allocator:", *(f"{name}={value}" for name, value in ALLOCATOR.items()))
    roofs = measure_roofs() if device.type == "cuda" else None
    dtype = args.dtype or ("bf16" if device.type == "cuda" else "fp32")

    args.output.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for name in args.sections or SECTIONS:
        tokens = (TOKENS if name in OTHERS else TOKENS_OF_MIXERS)[device.type]
        for D in args.channels or CHANNELS[device.type]:
            for T in args.tokens or tokens:
                torch.manual_seed(0)
                contenders = SECTIONS[name](Problem(T, D, DTYPES[dtype], device))
                times = on_gpu(contenders) if device.type == "cuda" else on_cpu(contenders, args.rounds, name)
                new = [row(name, T, D, dtype, each, contenders[each], times, roofs) for each in times]
                if new:
                    show(new)
                    rows += new
                    write_csv(rows, args.output / f"ops-{device.type}.csv")
    draw(rows, machine(device), args.output / f"ops-{device.type}.png")
    print(f"\nWritten: {args.output}/ops-{device.type}.csv, .png")


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} {capability}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def measure_roofs() -> tuple[float, float]:
    import op_roofs

    memory, exponentials = op_roofs.bytes_per_second(), op_roofs.exponentials_per_second()
    print(f"roofs: {memory / 1e12:.2f} TB/s, {exponentials / 1e12:.2f}e12 exponentials/s")
    return memory, exponentials


def on_cpu(contenders: dict[str, Contender], rounds: int, what: str) -> dict[str, list[float]]:
    """Milliseconds. Contenders take turns, so that a disturbance of the machine meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    quiet = not sys.stdout.isatty()
    for number in track(range(rounds + WARM_UP), what, transient=True, refresh_per_second=1, disable=quiet):
        for name, contender in contenders.items():
            begin = time.perf_counter()
            contender.run()
            if number >= WARM_UP:
                times[name].append((time.perf_counter() - begin) * 1e3)
    return times


def on_gpu(contenders: dict[str, Contender]) -> dict[str, list[float]]:
    """Milliseconds, with a cold L2 cache; what fails, or does not fit the memory, is left out."""
    from triton.testing import do_bench

    times = {}
    for name, contender in contenders.items():
        try:
            times[name] = do_bench(contender.run, warmup=50, rep=200, return_mode="all")
        except Exception as error:
            print(f"  {name}: {type(error).__name__}: {str(error).split(chr(10))[0]}")
    return times


def row(
    op: str,
    tokens: int,
    channels: int,
    dtype: str,
    name: str,
    contender: Contender,
    times: dict[str, list[float]],
    roofs: tuple[float, float] | None,
) -> Row:
    median, best = statistics.median(times[name]), min(times[name])
    base = next(iter(times.values()))
    shares = [None, None]
    if roofs is not None:
        needs = (contender.bytes, contender.exponentials)
        shares = [need / (median * 1e-3) / roof if need else None for need, roof in zip(needs, roofs, strict=True)]
    ratios = median / statistics.median(base), best / min(base)
    return Row(op, tokens, channels, dtype, name, median, best, *ratios, *shares)


def show(rows: list[Row]) -> None:
    first = rows[0]
    print(f"\n{first.op}: {first.tokens} tokens, {first.channels} channels, {first.dtype}")
    print(f"  {'':50} {'median':>9} {'ratio':>11} {'best':>12} {'ratio':>11}")
    for each in rows:
        shares = zip((each.memory_roof, each.exponential_roof), ("memory", "exp"), strict=True)
        print(
            f"  {each.contender:50} {each.median_ms:9.3f} ms {each.median_ratio:8.2f} x"
            f" {each.best_ms:9.3f} ms {each.best_ratio:8.2f} x"
            + "".join(f"  {share:4.0%} of {roof}" for share, roof in shares if share is not None)
        )


def write_csv(rows: list[Row], file: Path) -> None:
    with file.open("w", newline="") as out:
        table = csv.writer(out)
        table.writerow(Row._fields)
        table.writerows([*each[:5], *(x if x is None else f"{x:.4g}" for x in each[5:])] for each in rows)


def draw(rows: list[Row], title: str, file: Path) -> None:
    """Bars of ratios where an op was measured on one size, else times over tokens."""
    panels = list(dict.fromkeys((each.op, each.channels) for each in rows))
    figure = Figure(figsize=(12, 3.2 * len(panels)), layout="constrained")
    for axes, (op, channels) in zip(figure.subplots(len(panels), 1, squeeze=False).flat, panels, strict=True):
        shown = [each for each in rows if (each.op, each.channels) == (op, channels)]
        axes.set_title(f"{op}, {channels} channels, {shown[0].dtype}")
        if len({each.tokens for each in shown}) == 1:
            bars = axes.barh([each.contender for each in shown], [each.median_ratio for each in shown])
            axes.bar_label(bars, [f"{each.median_ratio:.2f}x, {each.median_ms:.3g} ms" for each in shown], padding=3)
            axes.invert_yaxis()
            axes.margins(x=0.2)
            axes.set_xlabel(f"median time / {shown[0].contender}")
        else:
            for name in dict.fromkeys(each.contender for each in shown):
                points = [each for each in shown if each.contender == name]
                axes.plot([each.tokens for each in points], [each.median_ms for each in points], marker="o", label=name)
            axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms")
            axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(title)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
