"""Values that a model makes of positions alone: rotary tables, learned embeddings of positions, ``arange``."""

from __future__ import annotations

from torch import Tensor, fx

from packc.passes.axes import value_of
from packc.passes.choose import is_random
from packc.passes.sources import is_argument


def knows_only_positions(node: fx.Node) -> bool:
    """Whether a value along the rows is made of nothing that the caller passed, its size aside.

    In a row of several documents it is read from its beginning for each. Not so what is drawn at random: no two tokens
    share a draw.
    """
    seen, queue = set[fx.Node](), [node]
    while queue:
        each = queue.pop()
        if each in seen or not isinstance(value_of(each), (Tensor, list, tuple)):
            continue
        seen.add(each)
        if is_argument(each) if each.op == "placeholder" else is_random(each):
            return False
        queue.extend(each.all_input_nodes)
    return True
