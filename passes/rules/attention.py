"""Attention over padded rows: scattered before it and gathered after it, exact where its mask hides padding."""

from __future__ import annotations

import torch

from packc.passes.asks import HidesPadding, KeepLeft
from packc.passes.axes import BATCH, OTHER, SEQ, show
from packc.passes.reading import NotTokenwise, Reading
from packc.passes.rules.registry import Op, register_rule

_HEADS_FIRST = (BATCH, OTHER, SEQ, OTHER)


@register_rule(torch.ops.aten.scaled_dot_product_attention.default)
def scaled_dot_product_attention(op: Op) -> Reading:
    """q, k, v (B, heads, L, channels), of one sequence; the mask (B or 1, heads or 1, L, L), or causal without one."""
    q, k, v, mask = op.args[:4]
    layouts = [op.layout(each) for each in (q, k, v)]
    if any(layout != _HEADS_FIRST for layout in layouts):
        raise NotTokenwise(f"attends with {', '.join(map(show, layouts))} where (B, ., L, .) is one sequence's")
    reading = Reading(_HEADS_FIRST, dict.fromkeys((q, k, v), _HEADS_FIRST), is_padded=True)
    if mask is not None:
        reading.asks.append(HidesPadding(mask))
    elif op.argument("is_causal"):
        reading.asks.append(KeepLeft("attention without a mask reads left padding"))
    else:
        raise NotTokenwise("attends to padding: it has no mask, and is not causal")
    return reading
