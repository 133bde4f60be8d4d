"""Features repeated; tokens are not."""

from __future__ import annotations

import torch

from packc.passes.axes import OTHER, covers_tokens, same_size, show
from packc.passes.reading import NotTokenwise, Reading
from packc.passes.rules.registry import Op, first_is_zero, register_rule

aten = torch.ops.aten


@register_rule(aten.repeat.default, aten.tile.default, zero=first_is_zero)
def repeat(op: Op) -> Reading:
    """x.repeat(*times), axes in front where there are more times than axes; x.tile(*times) takes fewer of them too."""
    x, times = op.args
    layout = op.layout(x)
    if layout is None or not covers_tokens(layout):
        raise NotTokenwise("works on a value without token axes")
    out = (OTHER,) * (len(times) - len(layout)) + layout
    for kind, n in zip(reversed(out), reversed(times), strict=False):
        if kind is not OTHER and not same_size(1, n):
            raise NotTokenwise(f"repeats the {kind.value} axis of {show(layout)}")
    return Reading(out, {x: layout})


@register_rule(aten.repeat_interleave.self_int, zero=first_is_zero)
def repeat_interleave(op: Op) -> Reading:
    """Every feature several times, side by side."""
    x, _, dim = op.args[:3]
    layout = op.layout(x)
    if layout is None or not covers_tokens(layout):
        raise NotTokenwise("works on a value without token axes")
    op.refuse_token_axes(list(range(len(layout))) if dim is None else [op.dim(dim, len(layout))], layout)
    return Reading(layout, {x: layout})
