"""What the demo does: the same training from the same weights on the same batches, under packc and without it."""

from __future__ import annotations

import random
from itertools import islice
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from transformers import MambaConfig, MambaForCausalLM

from packc.demo.contender import Contender, Job, TimeLimit
from packc.demo.data import documents, padded_batches, train_tokenizer
from packc.demo.plot import draw
from packc.demo.result import Result
from packc.demo.table import show
from packc.ops import cpu_library

if TYPE_CHECKING:
    import argparse

    from torch import Tensor

_TIMED = 10
"""Steps on the first batch from which a compiled contender's step time is taken."""


def compare(options: argparse.Namespace) -> int:
    """Run the demo; 1 if a loss curve is not stock's."""
    console = Console()
    columns = (
        *(SpinnerColumn(), TextColumn("{task.description:<28}"), BarColumn(10), MofNCompleteColumn()),
        *(TimeElapsedColumn(), TextColumn("{task.fields[note]}")),
    )
    # Drawn seldom: every core belongs to the contender, and drawing ten times a second is felt in its steps.
    with Progress(*columns, console=console, refresh_per_second=2) as progress:
        job = _prepare(options, progress)
        packc = _packc(job, options, progress)
        stock = []
        for name, run in (("inductor", _inductor), ("eager", _eager)):
            if name in options.skip:
                continue
            try:
                stock.append(run(job, options, progress))
            except TimeLimit as late:
                console.print(f"[yellow]{late}[/]")
    same = show(packc, stock, job.batches, console)
    draw(packc, stock, options.output)
    console.print(f"Plot: {options.output}")
    return 0 if same else 1


def _prepare(options: argparse.Namespace, progress: Progress) -> Job:
    task = progress.add_task("text, tokenizer, C++ kernels", total=3, note="")
    rows = options.steps * options.batch_size
    texts = list(islice(documents(seed=options.seed), 6 * rows))  # many are too long
    random.Random(options.seed).shuffle(texts)  # neighbours in a file are alike
    progress.advance(task)
    tokenizer = train_tokenizer(texts, vocab_size=512)
    all_batches = padded_batches(texts, tokenizer, batch_size=options.batch_size, max_length=options.max_length)
    batches = list(islice(all_batches, options.steps))
    if len(batches) < options.steps:
        raise SystemExit(
            f"Python's library has texts of at most {options.max_length} tokens for {len(batches)} steps only"
        )
    progress.advance(task)
    start = perf_counter()
    cpu_library.load("selective_scan")
    progress.update(task, advance=1, note=f"C++: {perf_counter() - start:.0f} s, once")
    config = {
        "hidden_size": options.hidden_size,
        "num_hidden_layers": options.layers,
        "vocab_size": len(tokenizer),
        "use_cache": False,
    }
    torch.manual_seed(options.seed)
    weights = MambaForCausalLM(MambaConfig(**config)).state_dict()
    return Job(config, weights, _typical_first(batches), options.learning_rate)


def _typical_first(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The batch of median padded size in front: the one that every contender is timed on."""
    by_size = sorted(range(len(batches)), key=lambda number: batches[number]["input_ids"].numel())
    typical = by_size[len(by_size) // 2]
    return [batches[typical], *batches[:typical], *batches[typical + 1 :]]


def _packc(job: Job, options: argparse.Namespace, progress: Progress) -> Result:
    task = progress.add_task("packc: training", total=len(job.batches), note="compiling")
    with Contender(job, "packc", time_limit=options.time_limit) as contender:
        curve = []
        for number, batch in enumerate(job.batches):
            step = contender.step(number)
            curve.append(step)
            tokens = int(batch["attention_mask"].sum())
            progress.update(task, advance=1, note=f"loss {step.loss:.3f}, {tokens / step.seconds:,.0f} tok/s")
        contender.restart()
        warm = [contender.step(0) for _ in range(_TIMED + 1)]
    return Result("packc", warm, curve[0], curve, [step.loss for step in warm])


def _inductor(job: Job, options: argparse.Namespace, progress: Progress) -> Result:
    """One shape only: stock Inductor compiles as long again for every further length."""
    task = progress.add_task("stock Inductor: first batch", total=_TIMED + 1, note="compiling: minutes")
    with Contender(job, "inductor", time_limit=options.time_limit) as contender:
        steps = []
        for _ in range(_TIMED + 1):
            steps.append(contender.step(0))
            progress.update(task, advance=1, note=f"loss {steps[-1].loss:.3f}")
    cold, *warm = steps
    return Result("stock Inductor", warm, cold, repeated=[step.loss for step in steps])


def _eager(job: Job, options: argparse.Namespace, progress: Progress) -> Result:
    count = min(options.eager_steps, len(job.batches))
    task = progress.add_task(f"stock eager: {count} batches", total=count, note="slow")
    with Contender(job, "eager", time_limit=options.time_limit) as contender:
        curve = []
        for number in range(count):
            curve.append(contender.step(number))
            progress.update(task, advance=1, note=f"loss {curve[-1].loss:.3f}")
    return Result("stock eager", curve[:1], curve=curve)
