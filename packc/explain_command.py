"""The command ``explain``: what becomes of a model of one's own."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch

import packc

_ABOUT = """\
Makes a model, runs it once on a padded batch as packc would compile it, and says which of its mixers are packed, what
runs padded and why. Exit status 1 if the model, or a mixer of it, is not packed."""
_EPILOG = """\
MODEL names a function without arguments that returns a model, or a model and the keyword arguments to call it with:
package.module:make_model, or path/to/file.py:make_model. Without arguments of its own a model is called with random
input_ids, attention_mask and labels, rows of different lengths padded to one, with ids below config.vocab_size."""


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "explain", help="what becomes of a model of your own", description=_ABOUT, epilog=_EPILOG
    )
    parser.add_argument("model", metavar="MODEL", help="package.module:function or file.py:function")
    parser.add_argument("--rows", type=int, default=4, help="of the random batch (%(default)s)")
    parser.add_argument("--length", type=int, default=64, help="to which its rows are padded (%(default)s)")
    parser.add_argument("--left", action="store_true", help="pad on the left")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    try:
        made = _function(options.model)()
        model, batch = made if isinstance(made, tuple) else (made, None)
        if batch is None:
            batch = _random_batch(model, options.rows, options.length, options.left)
    except (ValueError, ImportError, AttributeError) as error:
        print(f"{options.model}: {error}", file=sys.stderr)
        return 2
    report = packc.explain(model)(**batch)
    print(report)
    return 0 if report.fallback is None and all(mixer.packed for mixer in report.mixers) else 1


def _function(name: str) -> Any:
    module, colon, function = name.rpartition(":")
    if not colon:
        raise ValueError("names no function: write package.module:function or file.py:function")
    if not module.endswith(".py"):
        sys.path.insert(0, "")  # as for python -m
        return getattr(importlib.import_module(module), function)
    spec = importlib.util.spec_from_file_location(Path(module).stem, module)
    if spec is None or spec.loader is None or not Path(module).exists():
        raise ImportError(f"no file {module}")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return getattr(loaded, function)


def _random_batch(model: Any, rows: int, length: int, left: bool) -> dict[str, torch.Tensor]:
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if size is None:
        raise ValueError("the model has no config.vocab_size: return (model, keyword arguments)")
    lengths = torch.linspace(length, length // 4, rows).long().clamp_min(1)
    mask = torch.arange(length) < lengths[:, None]
    mask = mask.flip(1) if left else mask
    ids = torch.randint(size, (rows, length))
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}
