"""Memory and time of training steps that use nothing but the loss: ``python benchmarks/logits.py``.

A stock model (hidden size 256, 4 layers) with large vocabularies, on 8 rows of up to 128 tokens padded by half, fp32. A
step is forward, loss and backward, without an optimizer. Three contenders in one process: stock Inductor; packc with
``packc.lazy_logits`` off, which makes the logits of all tokens and scatters them; and packc.

The peak is that of live tensors beyond what there was before the step, weights' gradients among them, from torch's
profiler. Seconds are CPU time of the process, medians of steps that alternate.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from compiling import peak
from families import FAMILIES, batch, configuration
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
LENGTH = 128
FILLED = (1, 0.75, 0.625, 0.5, 0.4375, 0.3125, 0.25, 0.125)
"""How much of each row is tokens: half of all."""
CONTENDERS: dict[str, dict[str, Any]] = {
    "stock Inductor": {"backend": "inductor"},
    "packc, logits at once": {"backend": "packc", "options": {"packc.lazy_logits": False, "packc.strict": True}},
    "packc": {"backend": "packc", "options": {"packc.strict": True}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="llama", choices=list(FAMILIES), help="of models (%(default)s)")
    parser.add_argument("--vocabulary", type=int, nargs="*", default=[50_000, 128_000], help="sizes (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="steps of which the median is taken (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one step: tries this script, no figures")
    parser.add_argument("--output", type=Path, help=f"a JSON file (default: {RESULTS}/logits.json, --quick: none)")
    options = parser.parse_args()
    console, found = Console(), []
    for vocabulary in [512] if options.quick else options.vocabulary:
        found.append({"vocabulary": vocabulary, **measure(options, vocabulary)})
        show(found[-1], console)
    report = {
        "family": options.family,
        "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "processor": platform.processor()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "measured": found,
    }
    output = options.output or (None if options.quick else RESULTS / "logits.json")
    if output is not None:
        output.write_text(json.dumps(report, indent=2) + "\n")


def measure(options: argparse.Namespace, vocabulary: int) -> dict[str, Any]:
    hidden, layers, length = (32, 1, 16) if options.quick else (256, 4, LENGTH)
    family = FAMILIES[options.family]
    kind = getattr(transformers, family.model)
    config = getattr(transformers, family.config) if family.config else kind.config_class
    torch.manual_seed(0)
    model = kind(config(**{**configuration(options.family, hidden, layers), "vocab_size": vocabulary})).train()
    inputs = batch([int(share * length) for share in FILLED], length, vocabulary)
    steps: dict[str, Callable[..., Any]] = {name: torch.compile(model, **how) for name, how in CONTENDERS.items()}
    found: dict[str, Any] = {name: {"peak_mib": peak(step, inputs) / 2**20} for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(1 if options.quick else options.rounds):
        for name, step in steps.items():
            model.zero_grad()
            began = time.process_time()
            loss = step(**inputs).loss
            loss.backward()
            seconds[name].append(time.process_time() - began)
            found[name]["loss"] = loss.item()
    return {name: {**found[name], "seconds": median(seconds[name])} for name in steps}


def show(found: dict[str, Any], console: Console) -> None:
    table = Table(title=f"vocabulary {found['vocabulary']}: a step that uses the loss alone")
    stock = found["stock Inductor"]
    for column in ("", "peak, MiB", "of stock", "CPU s", "of stock", "loss"):
        table.add_column(column, justify="right")
    for name in CONTENDERS:
        one = found[name]
        shares = (f"{one[what] / stock[what]:.2f}" for what in ("peak_mib", "seconds"))
        table.add_row(
            name, f"{one['peak_mib']:.0f}", next(shares), f"{one['seconds']:.2f}", next(shares), f"{one['loss']:.6f}"
        )
    console.print(table)


if __name__ == "__main__":
    main()
