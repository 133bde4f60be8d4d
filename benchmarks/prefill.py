"""What packing saves in the prefill of ``model.generate``: ``python benchmarks/prefill.py``.

Rows of up to 512 tokens padded on the left, half of all positions padding. Stock models of families.py (hidden size
256, 4 layers, fp32, Inductor) generate one token, which is the prefill alone: the last logits, and a cache with every
row's states, keys and values. Two copies of a model take turns, both with packc's ops: one packed, one left unpacked.
Process CPU time and wall time, malloc as train.py sets it; medians, and the median of each turn's ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from operator import truediv
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any
from unittest import mock

import torch
from families import FAMILIES, build
from rich.console import Console
from rich.table import Table

import packc
from packc.demo.contender import ALLOCATOR
from packc.passes import NotPackable

ROWS, LENGTH = 8, 512
FILLED = (1, 0.75, 0.625, 0.5, 0.4375, 0.3125, 0.25, 0.125)  # of each row: half of all
DEFAULT = ("mamba", "mamba2", "bamba", "llama")
WARM_UP = 2  # calls, of which the first compiles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="family", help=f"of families.py (default: {' '.join(DEFAULT)})")
    parser.add_argument("--rounds", type=int, default=9, help="calls of which the median is taken (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny models, one round: tries this script, no figures")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})
    if unknown := set(options.families) - FAMILIES.keys():
        parser.error(f"no family {', '.join(sorted(unknown))}")
    table, found = Table(title="prefill, ms"), {}
    for column in ("", "packed", "unpacked", "ratio", "ratio of CPU time"):
        table.add_column(column)
    for family in options.families or DEFAULT:
        seconds = measure(family, options)
        ratios = {kind: median(map(truediv, *of.values())) for kind, of in seconds.items()}
        found[family] = {kind: {name: median(each) for name, each in of.items()} for kind, of in seconds.items()}
        ms = [f"{1e3 * found[family]['wall'][name]:.0f}" for name in ("packed", "unpacked")]
        table.add_row(family, *ms, *(f"{ratio:.2f}" for ratio in ratios.values()))
    Console().print(table)
    if options.output:
        options.output.write_text(json.dumps(found, indent=1))


def measure(family: str, options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Seconds of wall and of CPU time of each turn, unpacked and packed."""
    hidden, layers, length = (32, 2, 16) if options.quick else (256, 4, LENGTH)
    batch = left_padded(length)
    models = {name: build(family, hidden, layers).eval() for name in ("unpacked", "packed")}
    models["unpacked"].load_state_dict(models["packed"].state_dict())
    models["packed"].compile(backend="packc", options={"packc.strict": True})
    models["unpacked"].compile(backend="packc")
    seconds: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in models} for kind in ("wall", "cpu")}
    for number in range((1 if options.quick else options.rounds) + WARM_UP):
        tokens = []
        for name, model in models.items():
            began = perf_counter(), process_time()
            tokens.append(prefill(model, batch, packed=name == "packed"))
            took = perf_counter() - began[0], process_time() - began[1]
            if number >= WARM_UP:
                for kind, time in zip(("wall", "cpu"), took, strict=True):
                    seconds[kind][name].append(time)
        assert torch.equal(*tokens), f"{family}: other tokens"
    return seconds


def left_padded(length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    filled = torch.tensor([int(share * length) for share in FILLED])
    mask = (torch.arange(length) >= length - filled[:, None]).long()
    return {"input_ids": torch.randint(1, 512, mask.shape, generator=generator) * mask, "attention_mask": mask}


def prefill(model: Any, batch: dict[str, torch.Tensor], *, packed: bool) -> torch.Tensor:
    left = NotPackable("left unpacked, to compare")
    with mock.patch("packc.compiler.pack_graph", side_effect=None if packed else left, wraps=packc.compiler.pack_graph):
        generated: torch.Tensor = model.generate(**batch, max_new_tokens=1, do_sample=False, use_cache=True)
    return generated


if __name__ == "__main__":
    main()
