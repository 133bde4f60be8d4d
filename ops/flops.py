"""FLOPs of the ops, for torch's counter: registered when somebody imports it, as it imports triton in turn."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from packc.import_hook import on_import

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


def _register_all(counter: ModuleType) -> None:
    for op, formula in _formulas.items():
        counter.register_flop_formula(op)(formula)


on_import({_COUNTER: _register_all})
