"""A value shifted along the tokens of its documents, as a convolution of every channel with one tap.

Unlike other mixers it is as cheap as a copy: where an op without a packed form reads what is made of it, it is computed
padded, along whole rows, as any op is.
"""

from __future__ import annotations

import contextlib
import operator
from typing import Any

import torch
from torch import fx

from packc.fake_tensors import fake_mode_of
from packc.passes.axes import value_of
from packc.passes.graph import call_like

aten = torch.ops.aten


def shifted(graph: fx.Graph, like: fx.Node, x: fx.Node, by: int) -> fx.Node:
    """``x (B, L, D)`` of the token ``by`` places before each, zero where its document has none."""

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return call_like(graph, like, target, args, kwargs)

    value = value_of(x)
    with fake_mode_of(value) or contextlib.nullcontext():
        tap = call(aten.ones.default, [value.shape[2], 1], dtype=value.dtype, device=value.device)
    taps = call(aten.constant_pad_nd.default, tap, [0, by])
    both = call(torch.ops.packc.causal_conv1d.default, x, taps, None, None, None, None, False)
    return call(operator.getitem, both, 0)


def is_shift(node: fx.Node) -> bool:
    """Whether a node is such a convolution."""
    taps: Any = node.args[1] if node.target is torch.ops.packc.causal_conv1d.default else None
    if not isinstance(taps, fx.Node) or taps.target is not aten.constant_pad_nd.default:
        return False
    return taps.args[0].target is aten.ones.default  # type: ignore[union-attr]
