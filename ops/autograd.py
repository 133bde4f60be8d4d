"""What the ops ask of autograd, and a node of its graph. The only file that does, as all of it is private."""

from __future__ import annotations

import contextlib
import functools
import operator
from typing import Any

import torch
from torch.autograd import forward_ad

from packc.private_torch import private_torch

with private_torch():
    # What lets a node be made inside the dispatcher while a transform of torch.func is at work.
    from torch._functorch.utils import enable_single_level_autograd_function
    from torch.autograd.function import _SingleLevelFunction

    # Whether anything is asked for, without asking every tensor.
    _any_requires_grad = torch._C._any_requires_grad
    _forward_mode_enabled = torch._C._is_fwd_grad_enabled
    under_a_transform = torch._C._are_functorch_transforms_active
    _keys_of_modes = torch._C._dispatch_tls_local_include_set

    set_forward_mode = forward_ad._set_fwd_grad_enabled
    below_autograd = torch._C._AutoDispatchBelowAutograd
    _set_excluded = torch._C._SetExcludeDispatchKeyGuard
    _key = torch._C.DispatchKey.AutogradFunctionality

Node: Any = _SingleLevelFunction
"""A ``torch.autograd.Function`` that a kernel of the dispatcher may apply, by :func:`apply`."""

__all__ = [
    "RefusesTangents",
    "TangentGiven",
    "above_autograd",
    "apply",
    "below_autograd",
    "gradients_asked",
    "runs_on_cpu",
    "set_forward_mode",
    "tangents_given",
    "under_a_transform",
]


def apply(node: Any, *args: Any) -> Any:
    """``node.apply(*args)``, also in a kernel of the dispatcher that runs under a transform of ``torch.func``."""
    if not under_a_transform():
        return node.apply(*args)
    with enable_single_level_autograd_function():
        return node.apply(*args)


def above_autograd() -> contextlib.AbstractContextManager[Any]:
    """Within :func:`below_autograd`: autograd follows what is done in here."""
    return _set_excluded(_key, False)


def gradients_asked(*args: Any) -> bool:
    """Whether results of ``args`` are to be differentiated backwards."""
    return torch.is_grad_enabled() and _any_requires_grad(*args)


def tangents_given(*args: Any) -> bool:
    """Whether results of ``args`` are to carry tangents (forward mode).

    That Python knows no level (``torch.autograd.forward_ad``) does not say that there is none: a compiled graph enters
    it below. To ask a tensor is an op, which is dear and which a trace would record. A node of autograd's graph asks
    all of them at once, and leaves no trace.
    """
    if not _forward_mode_enabled():
        return False
    try:
        _Question.apply(*args) if not under_a_transform() else apply(_Question, *args)
    except TangentGiven:
        return True
    return False


_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, str))
with private_torch():
    # Of a thread in which nothing is at work: no mode, no transform, no vmap of either kind.
    _NO_MODES = functools.reduce(
        operator.or_,
        (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)) for key in ("BackendSelect", "ADInplaceOrView")),
    ).raw_repr()


def runs_on_cpu(*args: Any) -> bool:
    """Whether, below autograd, the dispatcher has nothing left to ask before an op's kernel for CPUs."""
    return args[0].is_cpu and _PLAIN.issuperset(map(type, args)) and _keys_of_modes().raw_repr() == _NO_MODES


class TangentGiven(Exception):
    """An argument of a :class:`RefusesTangents` has a tangent."""


class RefusesTangents(Node):
    """Autograd wants its forward derivative if, and only if, an argument has a tangent."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise TangentGiven


class _Question(RefusesTangents):
    """Has no results."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[()]:
        return ()
