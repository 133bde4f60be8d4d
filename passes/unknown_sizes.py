"""Sizes of which the compiler knows nothing: how many tokens a batch has, and documents."""

from __future__ import annotations

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

_SUPPOSED = 8192
"""What Inductor supposes of a size when it is told nothing."""
# Of a symbol, private: the range of its values, where that is from, and where the symbol is.
_KEPT_OF_SYMBOLS = ("var_to_range", "var_to_range_sloc", "var_to_stack")


def unknown_size(shape_env: ShapeEnv, least: int) -> torch.SymInt:
    """A new size that nothing is compiled for and no guard is on; that it is at least ``least``, which is positive, may
    be relied on."""
    with shape_env.ignore_fresh_unbacked_symbols():
        size = shape_env.create_unbacked_symint()
    size = _positive(size, shape_env)
    torch._check(size >= least)
    # Where costs are compared torch asks for a number again and again. Without one it factors each expression anew,
    # to look it up among equations.
    hints = getattr(shape_env, "var_to_hint_override", {})  # private; without, compiling takes longer, and nothing else
    hints[size.node.expr] = _SUPPOSED
    return size


def _positive(size: torch.SymInt, shape_env: ShapeEnv) -> torch.SymInt:
    """The size with a symbol that is known to be positive, as torch has them for sizes with a hint.

    Strides are products of ``max(size, 1)``: to sympy that is the size then, in each of ten thousands of expressions.
    """
    symbol = size.node.expr
    positive = sympy.Symbol(symbol.name, integer=True, positive=True)
    for kept in (getattr(shape_env, name, None) for name in _KEPT_OF_SYMBOLS):
        if kept is None or symbol not in kept:
            return size  # moved; without, compiling takes longer, and nothing else
    for name in _KEPT_OF_SYMBOLS:
        kept = getattr(shape_env, name)
        kept[positive] = kept.pop(symbol)
    made = shape_env.create_symintnode(positive, hint=None)
    assert isinstance(made, torch.SymInt)
    return made
