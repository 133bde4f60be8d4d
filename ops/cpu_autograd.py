"""The functions of the C++ libraries have no derivatives of their own: who asks for one is told where they are.

The public ops call them below autograd, so that what stands here costs them nothing.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import torch

from packc.ops import autograd
from packc.ops.untraced import untraced
from packc.private_torch import private_torch

with private_torch():
    _names_of_all_ops = torch._C._dispatch_get_all_op_names

_NAMESPACE = "packc_cpu::"
_PUBLIC = {
    "attention_spans": "packc.ops.varlen_attention",
    "gather_rows": "packc.ops.pack",
    "scatter_rows": "packc.ops.unpack",
    "silu": "torch.nn.functional.silu",
    "silu_slope": "torch.nn.functional.silu",
}

_library = torch.library.Library("packc_cpu", "FRAGMENT")


def refuse_derivatives() -> None:
    """Of all functions that are there by now."""
    for name in _names_of_all_ops():
        if name.startswith(_NAMESPACE):
            _refuse_derivatives_of(name.removeprefix(_NAMESPACE))


@functools.cache
def _refuse_derivatives_of(name: str) -> None:
    op = getattr(torch.ops.packc_cpu, name).default
    function = re.sub("_(bwd|summary|adjoint|enter|leave)$", "", name)
    public = _PUBLIC.get(function, f"packc.ops.{function}")

    def without_derivative(*args: Any) -> Any:
        if autograd.gradients_asked(*args) or autograd.tangents_given(*args):
            raise NotImplementedError(
                f"{_NAMESPACE}{name} has no derivative, and an argument asks for one; call {public}, which has"
            )
        with autograd.below_autograd():
            return op(*args)

    _library.impl(name, untraced(without_derivative), "Autograd")
