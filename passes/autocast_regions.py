"""Autocast that a graph turns on and off by itself, as accelerate does around a model's forward."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import fx

from packc.private_torch import private_torch

with private_torch():
    from torch.amp.autocast_mode import _enter_autocast, _exit_autocast


class UnderAutocast(fx.Interpreter):
    """Traces with autocast as it is where each node runs: a tracer notes where it is switched, but does not switch it,
    and values would have other dtypes than they come to have."""

    def run(self, *args: Any, **how: Any) -> Any:
        with contextlib.ExitStack() as self._regions:
            return super().run(*args, **how)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is _exit_autocast:
            noted, region = args[0]
            region.close()
            return super().call_function(target, (noted,), kwargs)
        result = super().call_function(target, args, kwargs)
        if target is not _enter_autocast:
            return result
        region = self._regions.enter_context(contextlib.ExitStack())
        region.enter_context(_Unnoted(torch.autocast(*args, **kwargs)))
        return result, region


class _Unnoted:
    """A context that a tracer, which listens to functions of torch, is not told of."""

    def __init__(self, context: contextlib.AbstractContextManager[Any]) -> None:
        self._context = context

    def __enter__(self) -> None:
        with torch._C.DisableTorchFunction():
            self._context.__enter__()

    def __exit__(self, *error: Any) -> None:
        with torch._C.DisableTorchFunction():
            self._context.__exit__(*error)
