"""A causal convolution across channels: for every group of them one product, with each token and those before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from packc.passes.axes import value_of
from packc.passes.graph import call_like
from packc.passes.shifted import shifted

aten = torch.ops.aten


def conv_across_channels(
    graph: fx.Graph, like: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None, step: int, groups: int
) -> fx.Node:
    """``x (B, L, D)``, ``weight (E, D / groups, W)``, whose taps are ``step`` tokens apart: ``(B, L, E)``."""

    def call(target: Any, *args: Any) -> fx.Node:
        return call_like(graph, like, target, args)

    outputs, channels, width = value_of(weight).shape
    tokens = [x]
    for _ in range(width - 1):
        tokens.insert(0, shifted(graph, like, tokens[0], step))
    if groups == 1:
        taps = call(aten.flatten.using_ints, call(aten.permute.default, weight, [0, 2, 1]), 1)
        return call(aten.linear.default, call(aten.cat.default, tokens, -1), taps, bias)
    apart = [call(aten.unflatten.int, each, -1, [groups, channels]) for each in tokens]
    taps = call(aten.unflatten.int, weight, 0, [groups, outputs // groups])
    taps = call(aten.flatten.using_ints, call(aten.permute.default, taps, [0, 3, 2, 1]), 1, 2)
    of_groups = call(aten.transpose.int, call(aten.cat.default, apart, -1), 1, 2)
    out = call(aten.transpose.int, call(aten.matmul.default, of_groups, taps), 1, 2)
    out = call(aten.flatten.using_ints, out, 2)
    return out if bias is None else call(aten.add.Tensor, out, bias)
