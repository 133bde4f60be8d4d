"""``logits[:, :-1]`` is cut from what is computed of all logits: a few positions more, and the work of all is packed.

    log_softmax(logits[:, :-1])  ->  log_softmax(logits)[:, :-1]

Positions stay apart in such ops, so the one is the other, whatever the axis means. What is computed of integers alone
and cut elsewhere, the next tokens' ids, is moved to where the rest is cut. A cut goes no further than to values of a
number or so a position, which masks are multiplied on: that is what heads are followed by (:mod:`packc.passes.heads`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from packc.passes.arguments import argument
from packc.passes.axes import is_made_of_integers, is_tensor, same_size, value_of
from packc.passes.graph import Graph, call_like
from packc.passes.place_wise import is_entrywise, works_behind
from packc.passes.sources import is_argument

aten = torch.ops.aten
_MOST = 16
"""Positions that a cut leaves out: of a head that reads a few of them, nothing is computed for the others."""


class _Cut(NamedTuple):
    whole: fx.Node
    front: int
    back: int
    """Positions left out."""


def cut_late(graph: Graph) -> Graph:
    """Compute on whole rows what positions are cut for, and cut its result; no-op elsewhere."""
    gm = graph.gm
    rows = [value_of(node).shape[:2] for node in graph.placeholders if is_argument(node) and value_of(node).ndim >= 2]
    cuts: dict[fx.Node, _Cut] = {}
    changed = False
    for node in list(gm.graph.nodes):
        cut = cut_of(node, rows)
        if cut is not None:
            cuts[node] = cut
        elif (base := _base(node, cuts)) is not None:
            with gm.graph.inserting_before(node):
                made = _later(gm.graph, node, base, cuts)
            node.replace_all_uses_with(made)
            cuts[made] = _Cut(made.all_input_nodes[0], base.front, base.back)
            changed = True
    if changed:
        gm.graph.eliminate_dead_code()
        gm.recompile()
    return graph


def cut_of(node: fx.Node, rows: list[Any]) -> _Cut | None:
    """What a slice of rows ``(B, L, ...)`` leaves out; None for any other, and where that is not a small number."""
    if node.target is not aten.slice.Tensor or argument(node, "step") != 1:
        return None
    whole: Any = node.args[0]
    shape = value_of(whole).shape
    if argument(node, "dim") % len(shape) != 1 or not any(all(map(same_size, shape[:2], each)) for each in rows):
        return None
    gone = left_out(node)
    return _Cut(whole, *gone) if gone is not None and 0 < sum(gone) <= _MOST else None


def left_out(sliced: fx.Node) -> tuple[int, int] | None:
    """How many positions a slice leaves out at the front and at the back; None where that is not a fixed number."""
    front = argument(sliced, "start") or 0
    gone = value_of(sliced.args[0]).shape[1] - value_of(sliced).shape[1]
    gone = gone if isinstance(gone, int) else gone.node.maybe_as_int()
    if not isinstance(front, int) or gone is None or not 0 <= front <= gone:
        return None
    return front, gone - front


def _base(node: fx.Node, cuts: dict[fx.Node, _Cut]) -> _Cut | None:
    """How the operands of an op are cut, if it can be done afterwards."""
    given = [each for each in node.all_input_nodes if is_tensor(each)]
    of = [each for each in given if each in cuts]
    numbers = [each for each in of if not is_made_of_integers(each)]
    if not numbers or node.op != "call_function" or not is_tensor(node) or value_of(numbers[0]).ndim < 3:
        return None
    base = cuts[numbers[0]]
    as_long = all(cuts[each].front + cuts[each].back == base.front + base.back for each in of)
    if not as_long or any(cuts[each][1:] != base[1:] for each in numbers):
        return None
    others = [each for each in given if each not in of]
    if node.target is aten.linear.default:
        fits = of == [node.args[0]]
    elif works_behind(node, 2):
        fits = not others and numbers == [node.args[0]]
    else:
        rank = value_of(node).ndim
        fits = is_entrywise(node) and of == numbers and all(value_of(each).ndim == rank for each in of)
        fits &= all(_is_same_along(each, rank) for each in others)
    return base if fits else None


def _is_same_along(other: fx.Node, rank: int) -> bool:
    """Whether a value that is broadcast to so many axes is the same for all positions."""
    shape = value_of(other).shape
    return len(shape) < rank - 1 or (len(shape) == rank and same_size(shape[1], 1))


def _later(graph: fx.Graph, node: fx.Node, base: _Cut, cuts: dict[fx.Node, _Cut]) -> fx.Node:
    def whole(operand: fx.Node) -> fx.Node:
        return _moved(graph, operand, cuts[operand], base) if operand in cuts else operand

    args, kwargs = fx.map_arg((node.args, node.kwargs), whole)
    computed = call_like(graph, node, node.target, args, kwargs)
    end = 2**63 - 1 if base.back == 0 else -base.back
    made = call_like(graph, node, aten.slice.Tensor, (computed, 1, base.front, end))
    made.meta["val"] = value_of(node)  # an output has the model's strides
    return made


def _moved(graph: fx.Graph, value: fx.Node, cut: _Cut, base: _Cut) -> fx.Node:
    """Rows in which ``base`` leaves over what ``cut`` does of a value; its own numbers elsewhere, which do no harm."""
    if cut[1:] == base[1:]:
        return cut.whole
    first = call_like(graph, value, aten.slice.Tensor, (cut.whole, 1, 0, base.front))
    last = call_like(graph, value, aten.slice.Tensor, (cut.whole, 1, -base.back, 2**63 - 1))
    parts = [*([first] if base.front else []), value, *([last] if base.back else [])]
    return call_like(graph, value, aten.cat.default, (parts, 1))
