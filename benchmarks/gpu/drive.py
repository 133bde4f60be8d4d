"""Runs every step in a process of its own, within a time: ``run.sh [--dry] OUT [SECONDS]``.

Writes ``results.jsonl``, a line a case as soon as it is known, ``log.txt`` and ``table.txt`` into OUT, and prints the
table last. Whatever a step does, the next one begins; a step that would not end in time is skipped, and says so.
``--dry`` runs the same steps at tiny sizes on a CPU: what is measured then means nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import child
import importable
import plan
import table
from step import HERE, Facts, Step

SECONDS = 470.0
RESERVE = 3.0  # seconds for the table, and for a child that will not end
LOG = 8 << 20  # bytes of the log at most


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("seconds", type=float, nargs="?", default=SECONDS, help=f"for all of it ({SECONDS:.0f})")
    parser.add_argument("--dry", action="store_true", help="at tiny sizes, on this machine's CPU")
    parser.add_argument("--steps", nargs="+", metavar="STEP", help="only these; see plan.py")
    args = parser.parse_args()
    steps = plan.steps(args.dry)
    if args.steps:
        if unknown := set(args.steps) - {step.name for step in steps}:
            parser.error(f"no step {', '.join(sorted(unknown))}: choose from {', '.join(s.name for s in steps)}")
        steps = [step for step in steps if step.name in args.steps]
    with tempfile.TemporaryDirectory(prefix="packc-gpu-") as scratch:
        environment = importable.environment(Path(scratch), args.dry)
        found = drive(steps, args.out, time.monotonic() + args.seconds, environment)
    return 0 if found else 1


def drive(steps: Sequence[Step], out: Path, deadline: float, environment: dict[str, str]) -> list[Facts]:
    """All that was found; it stands in ``out`` too."""
    child.adopt_orphans()
    out.mkdir(parents=True, exist_ok=True)
    with (out / "results.jsonl").open("w") as results, (out / "log.txt").open("w") as log:
        driver = Driver(results, log, deadline, environment | {"PACKC_GPU_OUT": str(out.absolute())})
        with _told_to_stop(driver):
            for step in steps:
                driver.run(step)
    lines = table.lines(driver.found, steps)
    (out / "table.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)
    return driver.found


class Stop(BaseException):
    """Somebody wants this process to end; there is time for the table."""


@contextlib.contextmanager
def _told_to_stop(driver: Driver) -> Iterator[None]:
    def stop(number: int, _: Any) -> None:
        raise Stop(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield
    except Stop as stopped:
        driver.tell("driver", why=f"stopped: {stopped}", ok=False, case="driver")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Driver:
    def __init__(self, results: IO[str], log: IO[str], deadline: float, environment: dict[str, str]) -> None:
        self.results, self.log, self.deadline, self.environment = results, log, deadline, environment
        self.began = time.monotonic()
        self.found: list[Facts] = []

    def run(self, step: Step) -> None:
        try:
            asked = step.ask(self.found)
        except Exception as error:  # a step may have said anything
            asked = f"what it needs cannot be read: {error!r}"
        if isinstance(asked, str):
            self.tell(step.name, needless=asked)
            return
        own = {name: text.format_map(self.environment) for name, text in step.environment}
        if absent := [name for name, text in own.items() if not text]:
            self.tell(step.name, skipped=f"nothing for {', '.join(absent)} here")
            return
        arguments: list[str] = []
        ends = time.monotonic() + step.limit
        for _ in range(step.restarts + 1):
            left = self.deadline - time.monotonic() - RESERVE
            if left < step.least:
                self.tell(step.name, skipped=f"wants {step.least:.0f} s, {max(left, 0):.0f} s are left")
                return
            hears = Hearing(self, step.name)
            ending = child.run(
                [*_command(step), *asked, *arguments],
                self.environment | (own or plan.mended(self.found, self.environment)),
                min(ends - time.monotonic(), left),
                step.quiet,
                hears.line,
                lambda line: self.write(step.name, line),
            )
            self.tell(step.name, ended=ending.how, seconds=round(ending.seconds, 1), nonsense=hears.nonsense)
            print(f"{step.name}: {ending.how}, {ending.seconds:.0f} s", file=sys.stderr, flush=True)
            if ending.how != "done" and hears.within is not None:
                self.tell(step.name, case=hears.within, ok=False, why=ending.how)
            if ending.how == "done" or hears.within is None or time.monotonic() >= ends:
                return
            arguments = ["--after", hears.within]

    def tell(self, step: str, **facts: Any) -> None:
        line = {"step": step, "at": round(time.monotonic() - self.began, 1), **facts}
        self.found.append(line)
        self.results.write(json.dumps(line) + "\n")
        self.results.flush()

    def write(self, step: str, line: str) -> None:
        if self.log.tell() < LOG:
            self.log.write(f"[{step}] {line}\n")
            self.log.flush()


class Hearing:
    """What a child prints: cases, or lines for the log."""

    def __init__(self, driver: Driver, step: str) -> None:
        self.driver, self.step = driver, step
        self.within: str | None = None  # the case that has begun and said nothing yet
        self.nonsense = 0  # lines that are neither

    def line(self, text: str) -> None:
        try:
            facts = json.loads(text)
        except (ValueError, RecursionError):
            facts = None
        if isinstance(facts, dict) and isinstance(facts.get("begin"), str):
            self.within = facts["begin"]
        elif isinstance(facts, dict) and isinstance(facts.get("case"), str):
            self.within = None
            self.driver.tell(self.step, **{name: x for name, x in facts.items() if name not in ("step", "at")})
        else:
            self.nonsense += bool(text.strip())
            self.driver.write(self.step, text)


def _command(step: Step) -> list[str]:
    """Files of this folder by their names; a first one is Python's to run."""
    parts = [str(HERE / part) if part.endswith(".py") else part for part in step.command]
    return [sys.executable, *parts] if step.command[0].endswith(".py") else parts


if __name__ == "__main__":
    os.environ["PYTHONUNBUFFERED"] = "1"
    sys.exit(main())
