"""What packing saves around a model: ``python benchmarks/heads.py``.

Rows of up to 512 tokens, half of all positions padding, against the same rows with nothing padded, which is the work of
the same graph unpacked. A stock ``MambaForCausalLM`` (hidden size 256, 2 layers) under Inductor:

- log-probabilities of the next tokens, without gradients: a log-softmax over the vocabulary, and a gather;
- a DPO step: chosen and rejected answers, two sequences in one graph, summed log-probabilities of each, a loss of their
  difference, and its gradients.

Every step is timed alternately on both batches; medians.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MambaConfig, MambaForCausalLM

import packc

ROWS, LENGTH = 8, 512
FILLED = (1, 0.75, 0.625, 0.5, 0.4375, 0.3125, 0.25, 0.125)  # of each row: half of all


class LogProbabilities(nn.Module):
    """Of every row's next tokens, ``(B, L - 1)``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1]
        found = logits.log_softmax(-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)
        return found * attention_mask[:, 1:]


class Preference(nn.Module):
    """DPO's loss (Rafailov et al., arXiv 2305.18290, equation 7) against a reference of zeros."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.of = LogProbabilities(model)

    def forward(self, chosen: dict[str, Tensor], rejected: dict[str, Tensor]) -> Tensor:
        return -F.logsigmoid(0.1 * (self.of(**chosen).sum(1) - self.of(**rejected).sum(1))).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=8192, help="tokens there are (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="steps of which the median is taken (%(default)s)")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    config = MambaConfig(vocab_size=options.vocabulary, hidden_size=256, num_hidden_layers=2, use_cache=False)
    model = MambaForCausalLM(config)
    table, found = Table(title="a step, ms"), {}
    for column in ("", "half padded", "nothing padded", "ratio"):
        table.add_column(column)
    for name, step in (("log-probabilities", log_probabilities(model)), ("DPO step", dpo(model))):
        half, full = timed(step, options)
        found[name] = {"half": half, "full": full}
        table.add_row(name, f"{1e3 * half:.0f}", f"{1e3 * full:.0f}", f"{half / full:.2f}")
    Console().print(table)
    if options.output:
        options.output.write_text(json.dumps(found))


def batch(filled: tuple[float, ...], vocabulary: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([int(share * LENGTH) for share in filled])
    mask = torch.arange(LENGTH) < lengths[:, None]
    ids = torch.randint(vocabulary, (ROWS, LENGTH), generator=generator)
    return {"input_ids": ids, "attention_mask": mask.long()}


Step = Callable[[tuple[float, ...], int], Any]


def log_probabilities(model: nn.Module) -> Step:
    compiled = torch.compile(LogProbabilities(model), backend=packc.backend, options={"packc.strict": True})

    def step(filled: tuple[float, ...], vocabulary: int) -> None:
        with torch.no_grad():
            compiled(**batch(filled, vocabulary, 0))

    return step


def dpo(model: nn.Module) -> Step:
    compiled = torch.compile(Preference(model), backend=packc.backend, options={"packc.strict": True})

    def step(filled: tuple[float, ...], vocabulary: int) -> None:
        rejected = batch(filled[::-1], vocabulary, 1)
        compiled(batch(filled, vocabulary, 0), rejected).backward()
        model.zero_grad()

    return step


def timed(step: Step, options: argparse.Namespace) -> tuple[float, float]:
    times: dict[bool, list[float]] = {True: [], False: []}
    for number in range(options.rounds + 2):
        for padded in (True, False):
            began = perf_counter()
            step(FILLED if padded else (1.0,) * ROWS, options.vocabulary)
            if number > 1:  # the first ones compile
                times[padded].append(perf_counter() - began)
    return median(times[True]), median(times[False])


if __name__ == "__main__":
    main()
