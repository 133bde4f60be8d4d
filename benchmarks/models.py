"""Training steps of stock models, packed by packc and padded by stock Inductor: ``python benchmarks/models.py``.

Each family of families.py has hidden size 256, 4 layers and vocabulary 512, in fp32. Batches are 8 rows of up to 128
tokens, once all full and once padded by half; a step is forward, loss and backward, without an optimizer. Every
contender runs in a process of its own with the same allocator settings and a fresh Inductor cache; the stock one never
imports packc. They compile one after the other, then step in turn. One whose step takes longer than the time limit
"did not finish".

Results are a line of JSON a family in models.jsonl, written as soon as it is measured: the command goes on where it was
interrupted. From all lines it makes models.md and models.png.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from families import FAMILIES, batch, build, configuration
from matplotlib.figure import Figure
from rich.console import Console

from packc.demo.contender import Contender, Job, Step, TimeLimit

RESULTS = Path(__file__).parent / "results"
LENGTH = 128
FILLED = (1, 0.75, 0.625, 0.5, 0.4375, 0.3125, 0.25, 0.125)
"""How much of each row is tokens: half of all."""
FULL, HALF = 0, 1
TARGETS = {"packing efficiency": 0.90, "Inductor / packc": 2.0}
MAMBA1 = {"mamba", "falcon_mamba", "jamba", "zamba"}
"""Stock unrolls their scan: 5 times is asked of them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="family", help=f"of {', '.join(FAMILIES)} (default: all)")
    parser.add_argument(
        "--quick", action="store_true", help="tiny models, one step each: tries this script, no figures"
    )
    parser.add_argument("--stock", default="inductor", help="the backend of the stock contender, or eager")
    parser.add_argument("--rounds", type=int, default=5, help="steps, a batch, of which the median is taken")
    parser.add_argument("--time-limit", type=float, default=600, help="seconds that any one step may take")
    parser.add_argument("--anew", action="store_true", help="measure again what has a line already")
    parser.add_argument("--output", type=Path, help=f"folder of the results (default: {RESULTS})")
    options = parser.parse_args()
    unknown = set(options.families) - FAMILIES.keys()
    if unknown:
        parser.error(f"no family {', '.join(sorted(unknown))}")
    output = options.output or (Path(tempfile.mkdtemp(prefix="packc-")) if options.quick else RESULTS)
    output.mkdir(parents=True, exist_ok=True)
    lines, console = output / "models.jsonl", Console()
    known = {} if not lines.exists() else {line["family"]: line for line in map(json.loads, lines.open())}
    wanted = options.families or list(FAMILIES)
    for number, family in enumerate(wanted, start=1):
        if family in known and not options.anew:
            console.print(f"{family}: measured already (--anew measures again)")
            continue
        console.print(f"{family} ({number} of {len(wanted)})")
        known[family] = measure(family, options, console)
        with lines.open("w") as out:
            out.writelines(json.dumps(known[each]) + "\n" for each in FAMILIES if each in known)
    measured = [known[family] for family in FAMILIES if family in known]
    (output / "models.md").write_text(table(measured))
    draw(measured, output / "models.png")
    console.print(table(measured), markup=False, highlight=False)
    console.print(f"Written: {lines}, models.md, models.png")


def measure(family: str, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    hidden, layers, length = (32, 2, 16) if options.quick else (256, 4, LENGTH)
    torch.manual_seed(0)
    batches = [batch([length] * len(FILLED), length), batch([int(share * length) for share in FILLED], length)]
    weights = build(family, hidden, layers).state_dict()
    job = Job(configuration(family, hidden, layers), weights, batches)
    job.model, job.config_class = FAMILIES[family].model, FAMILIES[family].config
    found: dict[str, Any] = {
        "family": family,
        "hidden": hidden,
        "layers": layers,
        "length": length,
        "rows": len(FILLED),
        "machine": {"cores": os.cpu_count(), "load before": os.getloadavg()[0], "python": platform.python_version()}
        | {"threads": torch.get_num_threads(), "torch": torch.__version__, "transformers": transformers.__version__},
    }
    backends = {"packc": "packc", "stock": options.stock}
    with console.status(family, refresh_per_second=1):  # seldom: every core belongs to the contenders
        found |= race(job, backends, 1 if options.quick else options.rounds, options.time_limit)
    for name in backends:
        console.print(f"  {name}: {found[name].get('failure') or _summary(found[name])}", markup=False)
    return found | ratios(found["packc"], found["stock"])


def race(job: Job, backends: dict[str, str], rounds: int, time_limit: float) -> dict[str, dict[str, Any]]:
    """Of each contender, what was seen of it, or why it is out: they compile one after the other and step in turn."""
    found: dict[str, dict[str, Any]] = {}
    steps: dict[str, list[tuple[Step, Step]]] = {name: [] for name in backends}
    first: dict[str, Step] = {}
    with ExitStack() as running:
        contenders = {}
        for name, backend in backends.items():
            with _or_out(name, found):
                contenders[name] = running.enter_context(Contender(job, backend, time_limit=time_limit))
                first[name] = contenders[name].step(HALF)
                contenders[name].step(FULL)
        for name in list(contenders) * rounds:
            if name not in found:
                with _or_out(name, found):
                    steps[name].append((contenders[name].step(FULL), contenders[name].step(HALF)))
    for name in backends.keys() - found.keys():
        full, half = zip(*steps[name], strict=True)
        found[name] = {
            "first_seconds": first[name].seconds,
            "full_seconds": median(each.seconds for each in full),
            "half_seconds": median(each.seconds for each in half),
            "peak_mib": max(each.peak_mib for each in half),
            "loss": half[-1].loss,
            "graphs": half[-1].graphs,
        }
    return found


@contextmanager
def _or_out(name: str, found: dict[str, dict[str, Any]]) -> Iterator[None]:
    try:
        yield
    except TimeLimit as error:
        found[name] = {"failure": str(error).partition(": ")[2]}
    except RuntimeError as error:
        said = [line for line in str(error).splitlines() if "Error: " in line] or str(error).splitlines()
        found[name] = {"failure": said[-1][:200]}


def ratios(packc: dict[str, Any], stock: dict[str, Any]) -> dict[str, float]:
    found = {}
    if "failure" not in packc:
        found["packing efficiency"] = packc["full_seconds"] / packc["half_seconds"] * sum(FILLED) / len(FILLED)
    if "failure" not in packc and "failure" not in stock:
        found["Inductor / packc"] = stock["half_seconds"] / packc["half_seconds"]
        compiling = [each["first_seconds"] - each["half_seconds"] for each in (packc, stock)]
        found["packc / Inductor, cold compile"] = compiling[0] / compiling[1] if compiling[1] > 0 else float("nan")
        found["loss, relative difference"] = abs(packc["loss"] - stock["loss"]) / abs(stock["loss"])
    return found


def _summary(one: dict[str, Any]) -> str:
    return (
        f"first step {one['first_seconds']:.1f} s, then {1e3 * one['half_seconds']:.1f} ms padded by half, "
        f"{1e3 * one['full_seconds']:.1f} ms full"
    )


def table(measured: list[dict[str, Any]]) -> str:
    """In Markdown, with what falls short of its target marked."""
    rows = [
        "| family | packc, ms | stock, ms | stock / packc | efficiency | compile, packc / stock | loss differs by |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in measured:
        faster = 5.0 if each["family"] in MAMBA1 else TARGETS["Inductor / packc"]
        cells = [
            each["family"],
            *(one.get("failure") or f"{1e3 * one['half_seconds']:.1f}" for one in (each["packc"], each["stock"])),
            _cell(each.get("Inductor / packc"), at_least=faster),
            _cell(each.get("packing efficiency"), at_least=TARGETS["packing efficiency"]),
            _cell(each.get("packc / Inductor, cold compile")),
            f"{each['loss, relative difference']:.0e}" if "loss, relative difference" in each else "",
        ]
        rows.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _cell(value: float | None, at_least: float = 0) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" + (f" (target {at_least:g})" if value < at_least else "")


def draw(measured: list[dict[str, Any]], file: Path) -> None:
    figure = Figure(figsize=(10, 1.5 + 0.3 * len(measured)), layout="constrained")
    names = [each["family"] for each in measured]
    for axes, ratio in zip(figure.subplots(1, 2, sharey=True), TARGETS, strict=True):
        axes.barh(names, [each.get(ratio, 0) for each in measured])
        axes.axvline(TARGETS[ratio], linestyle="--", color="grey")
        axes.set(xlabel=ratio)
    figure.axes[0].invert_yaxis()
    figure.suptitle("Training steps on batches padded by half")
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
