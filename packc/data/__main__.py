"""``python -m packc.data``: pack a log-normal corpus, and show what each window wastes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from packc.data.measure import Measured, Progress, log_normal, measure


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m packc.data",
        description="Pack documents of log-normal lengths to a budget of tokens, on one thread: how much of the budget"
        " is wasted by the window, how long it takes, and how long the ranks of a step wait for their slowest.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--documents", type=int, default=1_000_000, help="how many")
    parser.add_argument("--budget", type=int, default=8192, help="tokens of a batch; longer documents are cut")
    parser.add_argument("--median", type=float, default=400, help="length of documents, in tokens")
    parser.add_argument("--sigma", type=float, default=1.0, help="standard deviation of the logarithm of lengths")
    parser.add_argument("--windows", type=int, nargs="+", default=[256, 1024, 4096, 8192, 32768], metavar="N")
    parser.add_argument("--world-size", type=int, default=8, help="data-parallel ranks")
    parser.add_argument("--seed", type=int, default=0, help="of the lengths")
    parser.add_argument("--plot", type=Path, help="a picture of waste against window (needs matplotlib)")
    options = parser.parse_args(arguments)
    lengths = log_normal(
        options.documents, options.budget, median=options.median, sigma=options.sigma, seed=options.seed
    )
    print(f"{len(lengths)} documents, {sum(lengths)} tokens, {options.world_size} ranks, budget {options.budget}")
    print(
        f"{'window':>8} {'balance':>10} {'waste':>8} {'seconds':>8} {'waiting, tokens':>16} {'waiting, attention':>19}"
    )
    found = []
    for window in options.windows:
        for balance in ("tokens", "attention"):
            each = measure(
                lengths, options.budget, window=window, balance=balance,
                world_size=options.world_size, progress=_progress(f"window {window}, {balance}"),
            )  # fmt: skip
            found.append(each)
            print(
                f"{each.window:>8} {each.balance:>10} {each.waste:>8.2%} {each.seconds:>8.1f}"
                f" {each.straggling['tokens']:>16.2%} {each.straggling['attention']:>19.2%}"
            )
    if options.plot is not None:
        _draw(found, options.plot)
        print(f"wrote {options.plot}")
    return 0


def _progress(title: str) -> Progress:
    """A bar on the terminal, where rich is installed."""
    try:
        from rich.console import Console
        from rich.progress import Progress as Bar
    except ImportError:
        return lambda steps, documents: steps

    def shown(steps: Iterable[list[list[int]]], documents: int) -> Iterable[list[list[int]]]:
        with Bar(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(title, total=documents)
            for step in steps:
                yield step
                bar.advance(task, sum(map(len, step)))

    return shown


def _draw(found: list[Measured], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    waste, waiting = figure.subplots(1, 2)
    for balance in ("tokens", "attention"):
        of = [each for each in found if each.balance == balance]
        windows, label = [each.window for each in of], f"balanced {balance}"
        waste.plot(windows, [100 * each.waste for each in of], marker="o", label=label)
        waiting.plot(windows, [100 * each.straggling["attention"] for each in of], marker="o", label=label)
    waste.set(title="Budget without a token", yscale="log")
    waiting.set(title="Waiting for the rank with the most attention")
    for axes in (waste, waiting):
        axes.set(xlabel="window, documents", ylabel="%", xscale="log")
        axes.legend()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
