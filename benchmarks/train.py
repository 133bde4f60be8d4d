"""Training a stock MambaForCausalLM under packc, stock Inductor and stock eager: ``python benchmarks/train.py``.

The model has hidden size 256, 4 layers, vocabulary 512, fp32. Batches are 8 rows padded to 512 tokens; lengths are
log-normal with mean about 646 clipped to [57, 2048], scaled so that the longest of a batch has 512. A step is forward,
loss and backward, without an optimizer: all steps see the same weights, and all contenders must give the same loss.

Every contender runs in a process of its own with the same allocator settings and a fresh Inductor cache; the stock ones
never import packc. Stock settings are the defaults of transformers (``use_associative_scan=True``, which only compiled
models use) and of torch.compile. Packc's and Inductor's timed steps alternate, so that both see the same machine.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import transformers
from matplotlib.figure import Figure
from rich.console import Console
from rich.status import Status
from rich.table import Table
from transformers import MambaConfig, MambaForCausalLM

from packc.demo.contender import ALLOCATOR, Contender, Job, TimeLimit
from packc.ops import cpu_library

CONFIG = {"hidden_size": 256, "num_hidden_layers": 4, "vocab_size": 512, "use_cache": False}
ROWS, LENGTH = 8, 512
PADDING = [0.0, 0.3, 0.45, 0.6]
"""Share of each batch. Stock is timed on the second and the last: padding changes nothing for it."""
TARGETS = {
    "Inductor / packc, 60% padding": (">=", 14),
    "Inductor / packc, 30% padding": (">=", 8),
    "eager / packc, 60% padding": (">=", 250),
    "packc / Inductor, cold compile": ("<=", 0.25),
    "packing efficiency, 30% padding": (">=", 0.95),
    "packing efficiency, 45% padding": (">=", 0.95),
    "packing efficiency, 60% padding": (">=", 0.95),
}
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, few steps: tries this script, no figures")
    parser.add_argument("--rounds", type=int, default=5, help="times that every batch is timed under stock Inductor")
    parser.add_argument("--packc-steps", type=int, default=5, help="steps of packc, a batch, in each of these rounds")
    parser.add_argument("--eager-steps", type=int, default=1, help="steps of stock eager; each takes minutes")
    parser.add_argument("--time-limit", type=float, default=2400, help="seconds that any one step may take")
    parser.add_argument("--output", type=Path, help=f"folder for train.json, .csv and .png (default: {RESULTS})")
    options = parser.parse_args()
    config, length = dict(CONFIG), LENGTH
    if options.quick:
        config |= {"hidden_size": 32, "num_hidden_layers": 1}
        length = 64
    output = options.output or (Path(tempfile.mkdtemp(prefix="packc-")) if options.quick else RESULTS)

    torch.manual_seed(0)
    weights = MambaForCausalLM(MambaConfig(**config)).state_dict()
    job = Job(config, weights, [batch(share, length) for share in PADDING])
    console = Console()
    measured = measure(job, options, console)
    report = {
        "command": "python benchmarks/train.py" + " --quick" * options.quick,
        "machine": machine(),
        "model": {**config, "dtype": "float32", "rows": ROWS, "length": length},
        "step": "forward, loss, backward; no optimizer",
        "padding": [round(1 - each["attention_mask"].float().mean().item(), 4) for each in job.batches],
        **measured,
    }
    report["ratios"] = ratios(report)
    output.mkdir(parents=True, exist_ok=True)
    (output / "train.json").write_text(json.dumps(report, indent=2) + "\n")
    write_csv(report, output / "train.csv")
    draw(report, output / "train.png")
    show(report, console)
    console.print(f"Written: {output}/train.json, train.csv, train.png")


def batch(padding: float, length: int) -> dict[str, torch.Tensor]:
    """Random tokens padded on the right: of many draws of lengths, the one closest to the wanted share of padding."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.full((ROWS,), length)
    if padding:
        draws = torch.empty(200_000, ROWS).log_normal_(6.17, 0.85, generator=generator).clamp_(57, 2048)
        scaled = (draws * (length / draws.amax(1, keepdim=True))).round().long()
        lengths = scaled[(1 - scaled.sum(1) / (ROWS * length) - padding).abs().argmin()]
    mask = (torch.arange(length) < lengths[:, None]).long()
    tokens = torch.randint(1, CONFIG["vocab_size"], (ROWS, length), generator=generator) * mask
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


def measure(job: Job, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Everything that is timed: medians in seconds by contender and batch, and what went with them."""
    seconds: dict[str, dict[int, list[float]]] = {}
    losses: dict[str, dict[int, float]] = {}
    peaks: dict[str, dict[str, float]] = {}
    compiles: dict[str, float] = {}
    failures: dict[str, str] = {}
    stock_batches, last = (1, len(PADDING) - 1), len(PADDING) - 1

    def waiting(what: str) -> Status:
        return console.status(what, refresh_per_second=1)  # seldom: every core belongs to the contenders

    def timed(name: str, contender: Contender, number: int) -> None:
        step = contender.step(number)
        seconds.setdefault(name, defaultdict(list))[number].append(step.seconds)
        losses.setdefault(name, {})[number] = step.loss
        memory = peaks.setdefault(name, {})
        memory["steps"] = max(memory.get("steps", 0), step.peak_mib)

    def cold(name: str, contender: Contender) -> None:
        with waiting(f"{name}: compiling"):
            first = contender.step(last)
        compiles[name] = first.seconds
        peaks[name] = {"compiling": first.peak_mib}
        console.print(f"{name}: first step {first.seconds:.1f} s")

    with tempfile.TemporaryDirectory(prefix="packc-") as folder:
        os.environ["PACKC_CACHE_DIR"] = f"{folder}/kernels"
        with waiting("packc: building the C++ kernels"):
            start = perf_counter()
            cpu_library.load("selective_scan")
            compiles["packc's C++ kernels, once per machine"] = perf_counter() - start
        cache = Path(folder) / "inductor"
        limit = options.time_limit
        with Contender(job, "packc", cache=cache) as packc, Contender(job, "inductor", time_limit=limit) as inductor:
            cold("packc", packc)
            for number in range(len(PADDING)):
                packc.step(number)
            try:
                cold("inductor", inductor)
            except TimeLimit as late:
                failures["inductor"] = str(late)
            for number in range(options.rounds):
                with waiting(f"packc and Inductor in turn: round {number + 1} of {options.rounds}"):
                    for stock in stock_batches if "inductor" not in failures else ():
                        timed("inductor", inductor, stock)
                    for each in [*range(len(PADDING))] * options.packc_steps:
                        timed("packc", packc, each)
        with Contender(job, "packc", cache=cache) as again:
            cold("packc, warm start", again)
        with Contender(job, "eager", time_limit=limit) as eager:
            for number in range(options.eager_steps):
                with waiting(f"eager: step {number + 1} of {options.eager_steps}"):
                    try:
                        timed("eager", eager, last)
                    except TimeLimit as late:
                        failures["eager"] = str(late)
                        break
        threads = packc.threads
    return {
        "threads": threads,
        "allocator": ALLOCATOR,
        "step_seconds": {name: {n: median(times) for n, times in each.items()} for name, each in seconds.items()},
        "steps": {name: {n: len(times) for n, times in each.items()} for name, each in seconds.items()},
        "first_step_seconds": compiles,
        "peak_mib": peaks,
        "losses": losses,
        "failures": failures,
    }


def ratios(report: dict[str, Any]) -> dict[str, float]:
    """What the figures are taken for."""
    step, first = report["step_seconds"], report["first_step_seconds"]
    packc, last = step["packc"], len(PADDING) - 1
    found = {}
    for name, number in (("inductor", last), ("inductor", 1), ("eager", last)):
        if number in step.get(name, {}):
            label = {"inductor": "Inductor", "eager": "eager"}[name]
            found[f"{label} / packc, {PADDING[number]:.0%} padding"] = step[name][number] / packc[number]
    if "inductor" in first and last in step.get("inductor", {}):
        compiling = {name: first[name] - step[name][last] for name in ("packc", "inductor")}
        found["packc / Inductor, cold compile"] = compiling["packc"] / compiling["inductor"]
    for number in range(1, len(PADDING)):
        efficiency = packc[0] / packc[number] * (1 - report["padding"][number])
        found[f"packing efficiency, {PADDING[number]:.0%} padding"] = efficiency
    for name in ("inductor", "eager"):
        ours, theirs = report["losses"]["packc"], report["losses"].get(name, {})
        for number in theirs:
            key = f"loss: packc against {name}, relative difference"
            difference = abs(ours[number] - theirs[number]) / abs(theirs[number])
            found[key] = max(found.get(key, 0), difference)
    return found


def machine() -> dict[str, Any]:
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "load before": os.getloadavg()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def write_csv(report: dict[str, Any], file: Path) -> None:
    with file.open("w", newline="") as out:
        table = csv.writer(out)
        table.writerow(["contender", "padding", "median_step_seconds", "steps", "loss"])
        for name, times in report["step_seconds"].items():
            for number, seconds in sorted(times.items()):
                steps, loss = report["steps"][name][number], report["losses"][name][number]
                table.writerow([name, report["padding"][number], seconds, steps, loss])


def show(report: dict[str, Any], console: Console) -> None:
    steps = Table(title="training step, median (steps)")
    steps.add_column()
    for share in report["padding"]:
        steps.add_column(f"{share:.0%} padding", justify="right")
    for name, times in report["step_seconds"].items():
        counts = report["steps"][name]
        cells = [f"{times[n]:.3f} s ({counts[n]})" if n in times else "" for n in range(len(PADDING))]
        steps.add_row(name, *cells)
    console.print(steps)
    for name, seconds in report["first_step_seconds"].items():
        console.print(f"{name}: {seconds:.1f} s" + ("" if "kernels" in name else " to the end of the first step"))
    for name, memory in report["peak_mib"].items():
        console.print(f"{name}: peak memory " + ", ".join(f"{mib:,.0f} MiB {when}" for when, mib in memory.items()))
    for failure in report["failures"].values():
        console.print(f"[red]{failure}[/]")
    found = Table(title="ratios")
    for heading in ("", "measured", "target"):
        found.add_column(heading, justify="left" if not heading else "right")
    for name, value in report["ratios"].items():
        relation, target = TARGETS.get(name, ("", ""))
        found.add_row(name, f"{value:.3g}", f"{relation} {target}")
    console.print(found)
    if report["model"]["length"] != LENGTH:
        console.print("The targets are for the model in full size, not for --quick.")


def draw(report: dict[str, Any], file: Path) -> None:
    figure = Figure(figsize=(11, 4), layout="constrained")
    steps, efficiency = figure.subplots(1, 2)
    for name, times in report["step_seconds"].items():
        shares = [100 * report["padding"][number] for number in sorted(times)]
        steps.plot(shares, [times[number] for number in sorted(times)], marker="o", label=name)
    steps.set(yscale="log", xlabel="padding, %", ylabel="training step, s", xlim=(-5, 65))
    steps.legend()
    packc, padding = report["step_seconds"]["packc"], report["padding"]
    shares = [100 * share for share in padding]
    efficiency.plot(shares, [packc[0] / packc[n] * (1 - padding[n]) for n in range(len(padding))], marker="o")
    efficiency.axhline(0.95, linestyle="--", color="grey")
    efficiency.set(xlabel="padding, %", ylabel="packing efficiency", ylim=(0, 1.2), xlim=(-5, 65))
    machine = report["machine"]
    figure.suptitle(f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}")
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
