"""``python -m fuzz`` in tests/: random models against the passes, as many as wanted."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from fuzz.check import Outcome, Wrong, check
from fuzz.compiled import check_compiled
from fuzz.generate import generate
from fuzz.shrink import shrunk
from packc.passes.rules import RULES


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fuzz",
        description="Packs small random models and compares outputs and gradients with eager ones, on batches with"
        " padding of every kind. What is found is shrunk and printed as Python.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--first", type=int, default=0, help="the first seed; one that was stopped goes on from here")
    parser.add_argument("--count", type=int, default=10_000, help="how many seeds")
    parser.add_argument("--batches", type=int, default=4, help="batches a model")
    parser.add_argument("--compiled", action="store_true", help="through torch.compile: seconds a model")
    parser.add_argument("--inner", default="aot_eager", help="what compiles the packed graphs: inductor takes longest")
    parser.add_argument("--keep-going", action="store_true", help="after a fault too")
    parser.add_argument("--found", type=Path, help="a file to which faults are added")
    parser.add_argument("--coverage", action="store_true", help="at the end, the rules that nothing packed needed")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    console, tally = Console(stderr=True), _Tally()
    seeds = range(options.first, options.first + options.count)
    bar = Progress(*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn(), console=console)
    with bar:
        task = bar.add_task("models", total=len(seeds))
        for seed in seeds:
            fault = _tried(seed, options, tally)
            if fault is not None:
                bar.console.print(fault, markup=False, highlight=False)
                if options.found is not None:
                    with options.found.open("a") as file:
                        file.write(fault + "\n\n")
                if not options.keep_going:
                    break
            bar.update(task, advance=1, description=f"models, seed {seed}, {tally.counts['wrong']} wrong")
    print(tally.text(coverage=options.coverage))
    return 1 if tally.counts["wrong"] else 0


def _tried(seed: int, options: argparse.Namespace, tally: _Tally) -> str | None:
    """A fault in full, if there is one."""
    program = generate(seed)
    try:
        if options.compiled:
            tally.add(check_compiled(program, batches=options.batches, inner=options.inner))
        else:
            tally.add(check(program, batches=options.batches))
    except Wrong as fault:
        tally.counts["wrong"] += 1
        if options.compiled:
            return f"{program.describe()}\n# {fault}"
        program, text = shrunk(program, batches=options.batches)
        return f"{program.describe()}\n# {text}"
    return None


class _Tally:
    def __init__(self) -> None:
        self.counts, self.batches, self.rules, self.reasons = (Counter[str]() for _ in range(4))

    def add(self, outcome: Outcome) -> None:
        self.counts[outcome.kind] += 1
        self.batches["compared"] += outcome.batches
        self.batches["of which padding was left out"] += outcome.with_padding_left_out
        self.rules.update(outcome.rules.keys())
        if outcome.reason:
            self.reasons[outcome.reason.split(":")[0]] += 1

    def text(self, *, coverage: bool) -> str:
        total = sum(self.counts.values())
        lines = [", ".join(f"{count} {kind} ({count / total:.0%})" for kind, count in self.counts.most_common())]
        lines += [f"batches {name}: {count}" for name, count in self.batches.items()]
        lines += [f"unpacked, {count}: {reason}" for reason, count in self.reasons.most_common(12)]
        used = {rule for rule in RULES if self.rules[str(rule)]}
        lines.append(f"rules that something packed needed: {len(used)} of {len(RULES)}")
        if coverage:
            lines += sorted(f"  not needed: {rule}" for rule in set(RULES) - used)
        return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
