"""The command ``demo``: its options, and what it does from text to table."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

_EXTRAS = ("transformers", "tokenizers", "rich", "matplotlib")
_ABOUT = """\
Trains an unmodified MambaForCausalLM (random weights) on functions and docstrings of Python's standard library, padded
to the longest row of each batch, with torch.compile(model, backend="packc"); then a few steps of the same under stock
Inductor and in eager, each in a process that never imports packc, and compares. Nothing is downloaded."""


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "demo",
        help="train a stock Mamba packed, and compare with stock Inductor and eager",
        description=_ABOUT,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=_positive, default=40, help="training steps with packc")
    parser.add_argument("--eager-steps", type=_positive, default=3, help="of which stock eager repeats the first few")
    parser.add_argument("--batch-size", type=_positive, default=8, help="rows per batch")
    parser.add_argument("--max-length", type=_positive, default=128, help="tokens at which a row is cut")
    parser.add_argument("--hidden-size", type=_positive, default=128, help="width of the model")
    parser.add_argument("--layers", type=_positive, default=2, help="layers of the model")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="of AdamW")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data")
    parser.add_argument(
        "--skip", nargs="+", choices=("inductor", "eager"), default=[], help="stock contenders to leave out"
    )
    parser.add_argument("--time-limit", type=float, default=600, help="seconds that any one step may take")
    parser.add_argument("--output", type=Path, default=Path("packc_demo.png"), help="where the plot goes")
    parser.set_defaults(run=run)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {value}")
    return value


def run(options: argparse.Namespace) -> int:
    missing = [name for name in _EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        print(f'The demo needs {", ".join(missing)}: pip install "packc[examples]"', file=sys.stderr)
        return 2
    from packc.demo.compare import compare

    return compare(options)
