"""The command line: ``python -m packc COMMAND``, one module a command."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import packc
from packc import explain_command as explain
from packc.demo import command as demo
from packc.doctor import command as doctor

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m packc", description=packc.__doc__)
    parser.add_argument("--version", action="version", version=f"packc {packc.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for each in (demo, doctor, explain):
        each.add_to(commands)
    chosen = parser.parse_args(arguments)
    return chosen.run(chosen)
