"""FLOPs of the ops, for torch's counter: registered when somebody imports it, as it imports triton in turn."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable
from types import ModuleType
from typing import Any

import torch

from packc.import_hook import on_import
from packc.ops.shapes import Shapes

Formula = Callable[..., int]

_COUNTER = "torch.utils.flop_counter"
_formulas: dict[Any, Formula] = {}


def flop_formula(op: Any) -> Callable[[Formula], Formula]:
    """As ``torch.utils.flop_counter.register_flop_formula(op)``."""

    def decorate(formula: Formula) -> Formula:
        _formulas[op] = formula
        if (counter := sys.modules.get(_COUNTER)) is not None:
            counter.register_flop_formula(op)(formula)
        return formula

    return decorate


def count_flops(
    name: str, flops: Formula, shapes: Shapes, arguments: Collection[str], options: Iterable[str] = ()
) -> None:
    """Counts ``flops``, of the sizes and of those ``options`` that are arguments, by name, for ``packc::<name>``."""

    def formula(*args: Any, out_shape: Any = None, **named: Any) -> int:
        given = dict(zip(arguments, args)) | named  # noqa: B905  the rest is named, or left at its default
        # torch's counter has shapes in the place of tensors.
        sizes = shapes.sizes({name: given.get(name) for name in shapes.shapes})
        return flops(**sizes, **{name: given[name] for name in options if name in arguments})

    flop_formula(getattr(torch.ops.packc, name))(formula)


def _register_all(counter: ModuleType) -> None:
    for op, formula in _formulas.items():
        counter.register_flop_formula(op)(formula)


on_import({_COUNTER: _register_all})
