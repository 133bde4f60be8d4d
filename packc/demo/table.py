"""The demo's figures as a table, and whether the loss curves are stock's."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

from rich.table import Table

from packc.demo.result import Result, largest_difference

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console
    from torch import Tensor

TOLERANCE = 1e-4
"""Relative, between losses: rounding alone, carried through a few steps of AdamW."""


def show(packc: Result, stock: list[Result], batches: list[dict[str, Tensor]], console: Console) -> bool:
    """Print everything; whether all loss curves agree."""
    console.print("\n[bold]Training with packc[/]", _training(packc, batches))
    console.print(
        f"\n[bold]One shape[/]: {_size(batches[0])}. "
        "Each contender in its own process, the stock ones without packc, with the same allocator settings.",
        _comparison(packc, stock, batches[0]),
    )
    same = True
    for other in stock:
        ours, theirs, what = (
            (packc.losses(), other.losses(), "batches")
            if other.curve
            else (packc.repeated, other.repeated, "steps on the first batch")
        )
        difference = largest_difference(ours, theirs)
        agrees = difference <= TOLERANCE
        same = same and agrees
        console.print(
            f"Loss curve against {other.name}, {len(theirs)} {what}: "
            f"largest relative difference {difference:.1e}, tolerance {TOLERANCE:.0e}: "
            + ("[green]equal[/]" if agrees else "[red]NOT equal[/]")
        )
    return same


def _training(packc: Result, batches: list[dict[str, Tensor]]) -> Table:
    tokens = [int(batch["attention_mask"].sum()) for batch in batches]
    padded = [batch["attention_mask"].numel() for batch in batches]
    shapes = {tuple(batch["input_ids"].shape) for batch in batches}
    rates = [count / step.seconds for count, step in zip(tokens, packc.curve, strict=True)]
    table = Table(show_header=False)
    table.add_row("loss, first to last step", f"{packc.curve[0].loss:.3f} to {packc.curve[-1].loss:.3f}")
    table.add_row("steps, of as many batches", str(len(batches)))
    table.add_row("padding share", f"{1 - sum(tokens) / sum(padded):.0%} of {sum(padded):,} positions")
    table.add_row("batch shapes", str(len(shapes)))
    table.add_row("graphs compiled for them", str(packc.curve[-1].graphs))
    table.add_row("whole run, compiling included", _seconds(sum(step.seconds for step in packc.curve)))
    table.add_row("real tokens/s, median step", f"{median(rates):,.0f}")
    return table


def _comparison(packc: Result, stock: list[Result], batch: dict[str, Tensor]) -> Table:
    tokens = int(batch["attention_mask"].sum())
    table = Table()
    table.add_column()
    contenders = [packc, *stock]
    for each in contenders:
        table.add_column(each.name, justify="right")

    def row(label: str, figure: Callable[[Result], str]) -> None:
        table.add_row(label, *(figure(each) for each in contenders))

    row("training step, median", lambda each: _seconds(each.step_seconds))
    row("over so many steps", lambda each: str(len(each.warm)))
    row("times packc's", lambda each: f"{each.step_seconds / packc.step_seconds:,.1f}")
    row("real tokens/s", lambda each: f"{tokens / each.step_seconds:,.0f}")
    row("peak memory of a step", lambda each: f"{each.peak_mib:,.0f} MiB")
    row("compile time, cold", lambda each: "-" if each.compile_seconds is None else _seconds(each.compile_seconds))
    return table


def _size(batch: dict[str, Tensor]) -> str:
    mask = batch["attention_mask"]
    rows, length = mask.shape
    share = 1 - mask.float().mean().item()
    return f"the first batch, {rows} rows padded to {length}, {int(mask.sum())} real tokens, {share:.0%} padding"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"
