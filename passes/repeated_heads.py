"""Heads of keys and values that a model repeats, once for each head of a group of queries, as they were before.

    repeated = x[:, :, None].expand(B, heads, times, L, channels).reshape(B, heads * times, L, channels)

``varlen_attention`` knows groups, so nothing need be repeated for it: that writes, keeps and reads every key and value
several times, and sums their gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from packc.passes.axes import same_size, value_of

aten = torch.ops.aten

_AS_IT_IS = {aten.contiguous.default, aten.clone.default, aten.alias.default}
_VIEWS = {aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints}
_HEADS = 1  # of (B, heads, L, channels)


def before_repeats(repeated: fx.Node) -> fx.Node | None:
    """The value ``(B, heads, L, channels)`` of which each head stands several times in a row; None if there is none."""
    x: Any
    node = _seen_through(repeated)
    if node.target is aten.repeat_interleave.self_int:
        x, times, dim = (*node.args, None)[:3]
        at_heads = dim in (_HEADS, _HEADS - 4) and isinstance(times, int)
    elif node.target in _VIEWS and (expanded := _seen_through(node.args[0])).target is aten.expand.default:
        unsqueezed: Any = expanded.args[0]
        x = unsqueezed.args[0] if unsqueezed.target is aten.unsqueeze.default else None
        at_heads = x is not None and unsqueezed.args[1] in (_HEADS + 1, _HEADS + 1 - 5)
    else:
        return None
    return x if at_heads and _are_heads_of(x, value_of(repeated)) else None


def _seen_through(node: Any) -> fx.Node:
    while node.target in _AS_IT_IS:
        node = node.args[0]
    return node


def _are_heads_of(x: fx.Node, repeated: torch.Tensor) -> bool:
    """Whether nothing but the number of heads differs, so that a reshape put heads together with their repetitions."""
    before, after = value_of(x).shape, repeated.shape
    if len(before) != 4 or len(after) != 4:
        return False
    same = (same_size(before[axis], after[axis]) for axis in range(4) if axis != _HEADS)
    heads, all_heads = before[_HEADS], after[_HEADS]
    return all(same) and isinstance(heads, int) and isinstance(all_heads, int) and all_heads % heads == 0
