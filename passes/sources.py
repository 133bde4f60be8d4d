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


def is_parameter(node: fx.Node) -> bool:
    """Whether a placeholder is a weight of the model."""
    return isinstance(node.meta.get("example_value"), torch.nn.Parameter)


def is_argument(node: fx.Node) -> bool:
    """Whether a placeholder is a tensor that the caller passed, not a weight, a buffer or a global."""
    value = node.meta.get("val", node.meta.get("example_value"))
    if not isinstance(value, Tensor) or is_parameter(node):
        return False
    source = _source(node)
    if source is None:
        return True
    with private_torch():
        return _read(source.guard_source) in (GuardSource.LOCAL, GuardSource.SYNTHETIC_LOCAL)


def argument_path(node: fx.Node) -> str:
    """``chosen.attention_mask`` for ``L['chosen']['attention_mask']``: which argument, and what of it."""
    return ".".join(_path(node))


def is_called(node: fx.Node, name: str) -> bool:
    """Whether ``name`` is an argument's path, or the end of it: ``attention_mask`` for ``batch.attention_mask``."""
    wanted = name.split(".")
    return _path(node)[-len(wanted) :] == wanted


def _path(node: fx.Node) -> list[str]:
    source, path = _source(node), list[str]()
    while source is not None:
        step = next((getattr(source, name) for name in _STEPS if hasattr(source, name)), None)
        if isinstance(step, (str, int)):
            path.insert(0, str(step))
        source = getattr(source, "base", None)
    # What takes keyword arguments in is no part of their names.
    return path[1:] if path[:1] == ["kwargs"] and len(path) > 1 else path or [str(node.target)]


# The attribute in which each kind of source keeps its step: a local, an item of a container, an attribute.
_STEPS = ("local_name", "index", "member")


def _source(node: fx.Node) -> Any:
    return getattr(node, "_dynamo_source", None)


def _read(value: Any) -> Any:
    """Some of these were methods before they were properties."""
    return value() if callable(value) else value
