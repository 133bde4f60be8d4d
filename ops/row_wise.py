"""``packc::begin_row_wise`` and ``packc::end_row_wise``: marks around a function of rows, in graphs traced for packc.

Each row of what such a function returns is made of the same row of its arguments, in ways of its own: experts sort
tokens, count them and put them back. Between the marks nobody knows how many rows there are, so what is traced there is
right for all tokens and for some of them. The passes take the marks out again; run, they change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv

_lib = torch.library.Library("packc", "FRAGMENT")
_lib.define("begin_row_wise(Tensor[] x) -> Tensor[]")
_lib.define("end_row_wise(Tensor rows, Tensor x) -> Tensor")


def begin_row_wise(x: Sequence[Tensor]) -> list[Tensor]:
    """``x``, each ``(R, ...)``, with R of unknown size."""
    return torch.ops.packc.begin_row_wise.default(x)


def end_row_wise(rows: Tensor, x: Tensor) -> Tensor:
    """What was made of the rows of ``x``, with as many rows as ``x`` has."""
    return torch.ops.packc.end_row_wise.default(rows, x)


def _begin_fake(x: list[Tensor]) -> list[Tensor]:
    mode = x[0].fake_mode  # type: ignore[attr-defined]
    if mode.shape_env is None:
        mode.shape_env = ShapeEnv()
    rows = mode.shape_env.create_unbacked_symint()
    torch._check(rows >= 0)
    return [each.new_empty((rows, *each.shape[1:])) for each in x]


def _end_fake(rows: Tensor, x: Tensor) -> Tensor:
    return rows.new_empty((x.shape[0], *rows.shape[1:]))


def _begin(x: list[Tensor]) -> list[Tensor]:
    return [each.clone() for each in x]


def _end(rows: Tensor, x: Tensor) -> Tensor:
    return rows.clone()


def _setup(ctx: object, inputs: tuple[object, ...], output: object) -> None:
    pass


_lib.impl("begin_row_wise", _begin, "CompositeExplicitAutograd")
_lib.impl("end_row_wise", _end, "CompositeExplicitAutograd")
torch.library.register_fake("packc::begin_row_wise", _begin_fake, lib=_lib)
torch.library.register_fake("packc::end_row_wise", _end_fake, lib=_lib)
torch.library.register_autograd("packc::begin_row_wise", lambda ctx, grads: grads, setup_context=_setup, lib=_lib)
torch.library.register_autograd("packc::end_row_wise", lambda ctx, grad: (grad, None), setup_context=_setup, lib=_lib)
