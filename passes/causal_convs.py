"""Short causal convolutions that a model writes with ``conv1d`` become packc's, which are told where documents begin.

A convolution of every channel on its own is causal when its padding of ``width - 1`` lies before the first token alone:

    conv1d(x, weight, padding=width - 1, groups=channels)[..., :length]
    conv1d(pad(x, (width - 1, 0)), weight, groups=channels)

One with dilation is as wide as it reaches, with zeros between its taps.

Windows, which taps of each token's own are multiplied with, are such a convolution as well: of every channel ``width``
times, each with one tap that is 1.

    pad(x, (width - 1, 0)).unfold(-1, width, 1)
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from packc.fake_tensors import detect_fake_mode
from packc.passes.arguments import arguments_of
from packc.passes.axes import same_size, value_of
from packc.passes.graph import Graph, call_like

aten = torch.ops.aten
_PADS = {aten.pad.default, aten.constant_pad_nd.default}
_ZEROS = ([0], ["constant", None], ["constant", 0])
_SAME = {aten.alias.default, aten.contiguous.default}


def causal_convs(graph: Graph) -> Graph:
    """Replace every such convolution; no-op elsewhere."""
    gm = graph.gm
    for node in gm.graph.find_nodes(op="call_function", target=aten.conv1d.default):
        x, weight, bias, stride, padding, dilation, groups = _arguments(node)
        channels, width = value_of(x).shape[-2], (value_of(weight).shape[-1] - 1) * dilation[0] + 1
        if value_of(x).ndim != 3 or stride != [1] or not isinstance(width, int):
            continue
        if not same_size(groups, channels) or not same_size(value_of(weight).shape[0], channels):
            continue
        if padding == [0]:
            x, results = _unpadded(x, width), [node]
        else:
            results = list(_first(node, value_of(x).shape[2])) if padding == [width - 1] else []
        if x is None or not results:
            continue
        with gm.graph.inserting_before(node):
            replacement = _causal(gm.graph, node, x, weight, bias, dilation[0])
        for each in results:
            each.replace_all_uses_with(replacement)
    for node in gm.graph.find_nodes(op="call_function", target=aten.unfold.default):
        if (windowed := _windowed(node)) is not None:
            with gm.graph.inserting_before(node), detect_fake_mode(graph.inputs) or contextlib.nullcontext():
                node.replace_all_uses_with(_windows(gm.graph, node, windowed))
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return graph


def _arguments(node: fx.Node) -> list[Any]:
    return [list(each) if isinstance(each, (list, tuple)) else each for each in arguments_of(node).values()]


def _unpadded(x: fx.Node, width: int) -> fx.Node | None:
    """What was padded by ``width - 1`` zeros in front."""
    if width == 1:
        return x
    while x.target in _SAME or (x.target is aten.slice.Tensor and _keeps_all(x)):
        x = x.args[0]  # type: ignore[assignment]
    if x.target not in _PADS:
        return None
    inner, pads, *with_zeros = _arguments(x)
    return inner if pads == [width - 1, 0] and with_zeros in _ZEROS else None


def _windowed(node: fx.Node) -> fx.Node | None:
    """``x (B, channels, L)`` of whose tokens, and of those before them, an unfold makes windows."""
    x, dim, width, step = _arguments(node)
    if value_of(x).ndim != 3 or dim not in (2, -1) or step != 1 or not isinstance(width, int):
        return None
    inner = _unpadded(x, width)
    is_of_numbers = inner is not None and value_of(inner).is_floating_point()
    return inner if is_of_numbers and isinstance(value_of(inner).shape[1], int) else None


def _keeps_all(node: fx.Node) -> bool:
    return all(map(same_size, value_of(node).shape, value_of(node.args[0]).shape))


def _first(node: fx.Node, length: Any) -> Iterator[fx.Node]:
    """The slices of the first ``length`` positions, if nothing else is read of a value."""
    found: list[fx.Node] = []
    for user in node.users:
        if user.target in _SAME or (user.target is aten.slice.Tensor and _keeps_all(user)):
            inner = list(_first(user, length))
            if not inner:
                return
            found += inner
        elif user.target is aten.slice.Tensor and _takes_first(user, length):
            found.append(user)
        else:
            return
    yield from found


def _takes_first(node: fx.Node, length: Any) -> bool:
    _, dim, start, _, step = _arguments(node)
    return dim in (2, -1) and start in (None, 0) and step == 1 and same_size(value_of(node).shape[2], length)


def _causal(graph: fx.Graph, node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None, step: int) -> fx.Node:
    """In the dtype of the convolution, which under autocast is not that of its operands."""

    def call(target: Any, *args: Any) -> fx.Node:
        return call_like(graph, node, target, args)

    dtype = value_of(node).dtype
    operands = [
        each if each is None or value_of(each).dtype == dtype else call(aten.to.dtype, each, dtype)
        for each in (x, weight, bias)
    ]
    tokens, taps = call(aten.transpose.int, operands[0], 1, 2), call(aten.squeeze.dim, operands[1], 1)
    if step > 1:
        spread = call(aten.constant_pad_nd.default, call(aten.unsqueeze.default, taps, -1), [0, step - 1])
        taps = call(aten.slice.Tensor, call(aten.flatten.using_ints, spread, 1), 1, 0, 1 - step)
    both = call(torch.ops.packc.causal_conv1d.default, tokens, taps, operands[2], None, None, None, False)
    return call(aten.transpose.int, call(operator.getitem, both, 0), 1, 2)


def _windows(graph: fx.Graph, node: fx.Node, x: fx.Node) -> fx.Node:
    """``(B, channels, L, width)``, the token itself last."""

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return call_like(graph, node, target, args, kwargs)

    width, value = node.args[2], value_of(x)
    every = call(aten.repeat_interleave.self_int, call(aten.transpose.int, x, 1, 2), width, -1)
    taps = call(aten.eye.default, width, dtype=value.dtype, device=value.device)
    taps = call(aten.repeat.default, taps, [value.shape[1], 1])
    both = call(torch.ops.packc.causal_conv1d.default, every, taps, None, None, None, None, False)
    windows = call(aten.unflatten.int, call(operator.getitem, both, 0), -1, [value.shape[1], width])
    return call(aten.transpose.int, windows, 1, 2)
