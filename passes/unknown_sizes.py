"""Sizes of which the compiler knows nothing: how many tokens a batch has, and documents."""

from __future__ import annotations

import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

_SUPPOSED = 8192
"""What Inductor supposes of a size when it is told nothing."""


def unknown_size(shape_env: ShapeEnv, least: int) -> torch.SymInt:
    """A new size that nothing is compiled for and no guard is on; that it is at least ``least`` may be relied on."""
    with shape_env.ignore_fresh_unbacked_symbols():
        size = shape_env.create_unbacked_symint()
    torch._check(size >= least)
    # Where costs are compared torch asks for a number again and again. Without one it factors each expression anew,
    # to look it up among equations.
    hints = getattr(shape_env, "var_to_hint_override", {})  # private; without, compiling takes longer, and nothing else
    hints[size.node.expr] = _SUPPOSED
    return size
