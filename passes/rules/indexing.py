"""Entries taken by an index: of each token's features, or of a table by an index of each token's."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from packc.passes.axes import OTHER, Layout, covers_tokens, same_size, show, value_of
from packc.passes.reading import Call, NotTokenwise, Reading
from packc.passes.rules.registry import Op, broadcast_layout, first_is_zero, register_rule

aten = torch.ops.aten


@register_rule(aten.gather.default, aten.take_along_dim.default, zero=first_is_zero)
def gather(op: Op) -> Reading:
    """x.gather(dim, index) along features, x and index with the same tokens."""
    x, index, dim = op.args[0], op.argument("index", op.argument("indices")), op.argument("dim")
    layout = op.layout(x)
    if not covers_tokens(layout) or layout is None or op.layout(index) != layout:
        raise NotTokenwise(f"gathers from {show(layout)} by {show(op.layout(index))}")
    along = list(range(len(layout))) if dim is None else [op.dim(dim, len(layout))]
    op.refuse_token_axes(along, layout)
    reading = Reading(layout, {x: layout, index: layout})
    if op.target is aten.take_along_dim.default:  # which would compare the number of tokens with one, to broadcast
        sizes = enumerate(zip(value_of(x).shape, value_of(index).shape, strict=True))
        if not all(same_size(a, b) for axis, (a, b) in sizes if axis not in along):
            raise NotTokenwise(f"gathers from {show(layout)} by an index that is broadcast")
        reading.call = Call(aten.gather.default, (x, along[0], index), {})
    return reading


@register_rule(aten.index_select.default, zero=first_is_zero)
def index_select(op: Op) -> Reading:
    """x.index_select(dim, index): some features of every token, or from a table by an index (tokens,)."""
    x, dim, index = op.args
    dim, layout = op.dim(dim, value_of(x).ndim), op.layout(x)
    if value_of(index).ndim == 0 and covers_tokens(layout):  # one entry, whose axis stays
        op.refuse_token_axes([dim], layout)
        return Reading(layout, {x: layout})
    return _taken(op, x, [*[None] * dim, index])


@register_rule(aten.index.Tensor, zero=first_is_zero)
def index(op: Op) -> Reading:
    """x[:, i, j]: some features of every token, or from a table by indices of which any has token axes."""
    return _taken(op, *op.args[:2])


def _taken(op: Op, x: fx.Node, indices: list[Any]) -> Reading:
    """Axes of ``x`` without an index stay. The others become those of the indices, broadcast: where they were, or at
    the front if an axis stays between them."""
    places = [axis for axis, each in enumerate(indices) if each is not None]
    by = [indices[axis] for axis in places]
    if any(value_of(each).dtype in (torch.bool, torch.uint8) for each in by):
        raise NotTokenwise("takes what is marked, of which nobody knows how much there is")
    shape = torch.broadcast_shapes(*(value_of(each).shape for each in by))
    layout = op.layout(x) or (OTHER,) * value_of(x).ndim
    op.refuse_token_axes(places, layout)
    of_index: Layout = (OTHER,) * len(shape)
    needs: dict[fx.Node, Layout] = {}
    if any(covers_tokens(op.layout(each)) for each in by):
        if covers_tokens(op.layout(x)):
            raise NotTokenwise(f"gathers from {show(layout)} by {show(op.layout(by[0]))}")
        of_index, needs = broadcast_layout(op, by, shape)
    elif covers_tokens(layout):
        needs = {x: layout}
    else:
        raise NotTokenwise("indices have no token axes")
    stays = [kind for axis, kind in enumerate(layout) if axis not in places]
    at = places[0] if places == list(range(places[0], places[-1] + 1)) else 0
    return Reading((*stays[:at], *of_index, *stays[at:]), needs)
