"""What the steps' files share: their arguments, and one line a case, whatever becomes of it."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

DEVICE_IS_LOST = 7  # exit status after an error that leaves nothing else to be done in a process


def parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--only", nargs="+", metavar="CASE", help="these cases")
    made.add_argument("--after", metavar="CASE", help="the cases behind this one, which ended an earlier run")
    made.add_argument(
        "--dry", action="store_true", default=bool(os.environ.get("PACKC_GPU_DRY")), help="tiny, on the CPU"
    )
    return made


def device(dry: bool) -> torch.device:
    return torch.device("cpu" if dry else "cuda")


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def tell(case: str, **facts: Any) -> None:
    print(json.dumps({"case": case, **facts}), flush=True)


def each(args: argparse.Namespace, names: Iterable[str], facts_of: Callable[[str], dict[str, Any]]) -> None:
    """A line a case. What is wrong with the device ends the process: nothing that follows would mean anything."""
    names = list(names)
    if args.only:
        names = [name for name in names if name in args.only]
    if args.after in names:
        names = names[names.index(args.after) + 1 :]
    for name in names:
        print(json.dumps({"begin": name}), flush=True)
        began = time.perf_counter()
        try:
            facts = facts_of(name)
            synchronize()
        except Exception as error:
            import traceback

            traceback.print_exc()
            tell(name, ok=False, why=said(error))
            if is_lost(error):
                sys.exit(DEVICE_IS_LOST)
        else:
            tell(name, **facts, seconds=round(time.perf_counter() - began, 2))


def said(error: Exception) -> str:
    first = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {first}"[:200]


def is_lost(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError):
        return False
    return "CUDA error" in str(error) or "device-side assert" in str(error) or "illegal memory" in str(error)
