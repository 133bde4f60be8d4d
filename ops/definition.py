"""How an op of packc's comes to torch: its schema, what runs it, and a fake that tells sizes of its results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

LIBRARY = torch.library.Library("packc", "FRAGMENT")


def schema(name: str, arguments: Mapping[str, str], returns: str) -> str:
    """``arguments``: types by name, in order."""
    return f"{name}({', '.join(f'{kind} {argument}' for argument, kind in arguments.items())}) -> {returns}"


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any], tags: Sequence[torch.Tag] = ()) -> None:
    """``packc::<schema>``, with one kernel for CPUs and GPUs."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=tags)
    LIBRARY.impl(name, kernel, "CPU")
    LIBRARY.impl(name, kernel, "CUDA")
    torch.library.register_fake(f"packc::{name}", fake, lib=LIBRARY)
