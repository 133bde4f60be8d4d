"""What runs below the dispatcher is no part of a user's model, so Dynamo has nothing to trace in it.

Behind a graph break Dynamo looks at every frame of Python that is entered, those of the ops' kernels too: it would hand
their pieces to the user's backend, and fail on those that it cannot trace.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from packc.private_torch import private_torch

with private_torch():
    # torch.compiler.disable does this by a wrapper, which costs every call something, and imports Dynamo.
    from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

    _SKIP = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)

Function = TypeVar("Function", bound=Callable[..., Any])


def untraced(function: Function) -> Function:
    """``function``, which Dynamo leaves alone from now on when it is called, and with it everything that it calls."""
    set_code_exec_strategy(function.__code__, _SKIP)
    return function


def outside_of_graphs(reason: str) -> Callable[[Function], Function]:
    """The same for a function that a model calls: Dynamo breaks the graph there, and gives the reason."""

    def decorate(function: Function) -> Function:
        # What torch.compiler.disable notes on a function.
        function._torchdynamo_disable = True  # type: ignore[attr-defined]
        function._torchdynamo_disable_msg = reason  # type: ignore[attr-defined]
        return untraced(function)

    return decorate
