"""Values with a part put in their place: what writes through views become (:mod:`packc.passes.functional`), or by an
index, as routers of experts mark what they chose."""

from __future__ import annotations

from typing import Any

import torch

from packc.passes.axes import OTHER, Axis, covers_tokens, is_tensor, show, value_of
from packc.passes.reading import Call, NotTokenwise, Reading
from packc.passes.rules.registry import Op, both_are_zero, register_rule

aten = torch.ops.aten

# A value to be written to was made with the sizes of padded rows, and nothing in it speaks of tokens yet.
_MADE = {
    aten.empty.memory_format: aten.new_empty.default,
    aten.zeros.default: aten.new_zeros.default,
    aten.ones.default: aten.new_ones.default,
}


@register_rule(aten.slice_scatter.default, aten.select_scatter.default, zero=both_are_zero)
def scatter(op: Op) -> Reading:
    """A part of the features; ``whole`` and ``part`` have the same tokens, or ``whole`` is made for them."""
    whole, part, dim = op.args[:3]
    shape = value_of(whole).shape
    dim = op.dim(dim, len(shape))
    layout = op.layout(whole)
    of_part = op.layout(part)
    expected: Any = None
    if covers_tokens(of_part):
        expected = of_part if op.target is aten.slice_scatter.default else (*of_part[:dim], OTHER, *of_part[dim:])
        layout = layout if covers_tokens(layout) else expected
    if not covers_tokens(layout) or (expected is not None and layout != expected):
        raise NotTokenwise(f"puts {show(of_part)} into {show(op.layout(whole))}")
    op.refuse_token_axes([dim], layout)
    needs = {part: layout if op.target is aten.slice_scatter.default else layout[:dim] + layout[dim + 1 :]}
    sizes = [size if kind is OTHER else kind for kind, size in zip(layout, shape, strict=True)]
    if whole.target in _MADE and all(isinstance(size, (int, Axis)) for size in sizes):
        like = {"dtype": value_of(whole).dtype, "device": value_of(whole).device}
        made = Call(_MADE[whole.target], (part, sizes), like)
        return Reading(layout, needs, Call(op.target, (made, *op.args[1:]), {}))
    return Reading(layout, needs | {whole: layout})


@register_rule(aten.scatter.value, aten.scatter.src, aten.scatter_add.default)
def scatter_by_index(op: Op) -> Reading:
    """x.scatter(dim, index, src) along features, all with the same tokens; or one number in the place of src."""
    x, dim, index, src = op.args
    operands = [each for each in (x, index, src) if is_tensor(each)]
    layout = op.layout(x)
    if not covers_tokens(layout) or layout is None or any(op.layout(each) != layout for each in operands):
        given = " and ".join(show(op.layout(each)) for each in operands[1:])
        raise NotTokenwise(f"scatters {given} into {show(layout)}")
    op.refuse_token_axes([op.dim(dim, len(layout))], layout)
    return Reading(layout, dict.fromkeys(operands, layout))
