"""Where a graph's inputs come from: arguments of the compiled function, or a module's parameters and buffers.

The one place that reads Dynamo's sources, which are private.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from packc.private_torch import private_torch

with private_torch():
    from torch._guards import GuardSource


def is_argument(node: fx.Node) -> bool:
    """Whether a placeholder is a tensor that the caller passed, not a weight, a buffer or a global."""
    if not isinstance(node.meta.get("val"), Tensor) or isinstance(node.meta.get("example_value"), torch.nn.Parameter):
        return False
    source = _source(node)
    if source is None:
        return True
    with private_torch():
        return _read(source.guard_source) in (GuardSource.LOCAL, GuardSource.SYNTHETIC_LOCAL)


def argument_name(node: fx.Node) -> str:
    """``attention_mask`` for ``L['kwargs']['attention_mask']``: the last name in the source."""
    source = _source(node)
    with private_torch():
        text = _read(source.name) if source is not None else str(node.target)
    return text.rstrip("'\"]").replace('"', "'").split("'")[-1].split(".")[-1]


def _source(node: fx.Node) -> Any:
    return getattr(node, "_dynamo_source", None)


def _read(value: Any) -> Any:
    """Some of these were methods before they were properties."""
    return value() if callable(value) else value
