"""Short causal convolutions that a model writes with ``conv1d`` become packc's, which are told where documents begin.

A convolution is causal when its padding of ``width - 1`` lies before the first token alone:

    conv1d(x, weight, padding=width - 1, groups=channels)[..., :length]
    conv1d(pad(x, (width - 1, 0)), weight, groups=channels)

One with dilation is as wide as it reaches, with zeros between its taps. One across channels is a product with all the
tokens that it reaches (:mod:`packc.passes.convs_across_channels`).

Several in a row may share what lies before the first token, ``conv1d(conv1d(pad(x, (3, 0)), ...), ...)``. What the
second sees there is the bias of the first: so the first goes without, and what the second makes of it is in its own.

Windows, which taps of each token's own are multiplied with, are such a convolution as well: of every channel ``width``
times, each with one tap that is 1.

    pad(x, (width - 1, 0)).unfold(-1, width, 1)
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import fx

from packc.fake_tensors import detect_fake_mode
from packc.passes.arguments import arguments_of
from packc.passes.axes import same_size, value_of
from packc.passes.convs_across_channels import conv_across_channels
from packc.passes.graph import Graph, call_like

aten = torch.ops.aten
_PADS = {aten.pad.default, aten.constant_pad_nd.default}
_ZEROS = ([0], ["constant", None], ["constant", 0])
_MOST_TAPS = 16
"""Of a convolution across channels, which reads every token as often."""
_SAME = {aten.alias.default, aten.contiguous.default}


class _Conv(NamedTuple):
    """A call of ``conv1d`` that moves on by one."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    padding: list[int]
    step: int
    groups: int

    @property
    def reach(self) -> int:
        """How many tokens before its own it looks at."""
        return (value_of(self.weight).shape[-1] - 1) * self.step


def causal_convs(graph: Graph) -> Graph:
    """Replace every such convolution; no-op elsewhere."""
    gm = graph.gm
    # The last of several in a row before the others, which nobody reads then.
    for node in reversed(list(gm.graph.find_nodes(op="call_function", target=aten.conv1d.default))):
        conv = _conv_of(node)
        if conv is None or not node.users:
            continue
        if conv.padding == [0]:
            x, convs = _behind_padding(conv)
            results = [node]
        else:
            x, convs = conv.x, [conv]
            results = list(_first(node, value_of(conv.x).shape[2])) if conv.padding == [conv.reach] else []
        if x is None or not results:
            continue
        with gm.graph.inserting_before(node):
            replacement = _causal(gm.graph, node, x, convs)
        for each in results:
            each.replace_all_uses_with(replacement)
            gm.graph.erase_node(each)
    for node in gm.graph.find_nodes(op="call_function", target=aten.unfold.default):
        if (windowed := _windowed(node)) is not None:
            with gm.graph.inserting_before(node), detect_fake_mode(graph.inputs) or contextlib.nullcontext():
                node.replace_all_uses_with(_windows(gm.graph, node, windowed))
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return graph


def _conv_of(node: fx.Node) -> _Conv | None:
    if node.target is not aten.conv1d.default:
        return None
    x, weight, bias, stride, padding, dilation, groups = _arguments(node)
    sizes = value_of(weight).shape
    if value_of(x).ndim != 3 or stride != [1] or not all(isinstance(size, int) for size in (groups, *sizes)):
        return None
    if sizes[1] > 1 and sizes[2] > _MOST_TAPS:
        return None
    return _Conv(node, x, weight, bias, padding, dilation[0], groups)


def _behind_padding(last: _Conv) -> tuple[fx.Node | None, list[_Conv]]:
    """What was padded by as many zeros in front as convolutions reach back, if it was, and these, in order."""
    convs, reach = [last], last.reach
    while (x := _unpadded(convs[0].x, reach)) is None:
        before = _conv_of(_kept(convs[0].x))
        if before is None or before.padding != [0]:
            return None, convs
        convs.insert(0, before)
        reach += before.reach
    return x, convs


def _arguments(node: fx.Node) -> list[Any]:
    return [list(each) if isinstance(each, (list, tuple)) else each for each in arguments_of(node).values()]


def _kept(x: fx.Node) -> fx.Node:
    """What a node is the same as."""
    while x.target in _SAME or (x.target is aten.slice.Tensor and _keeps_all(x)):
        x = x.args[0]  # type: ignore[assignment]
    return x


def _unpadded(x: fx.Node, reach: int) -> fx.Node | None:
    """What was padded by so many zeros in front."""
    if reach == 0:
        return x
    x = _kept(x)
    if x.target not in _PADS:
        return None
    inner, pads, *with_zeros = _arguments(x)
    return inner if pads == [reach, 0] and with_zeros in _ZEROS else None


def _windowed(node: fx.Node) -> fx.Node | None:
    """``x (B, channels, L)`` of whose tokens, and of those before them, an unfold makes windows."""
    x, dim, width, step = _arguments(node)
    if value_of(x).ndim != 3 or dim not in (2, -1) or step != 1 or not isinstance(width, int):
        return None
    inner = _unpadded(x, width - 1)
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


def _causal(graph: fx.Graph, node: fx.Node, x: fx.Node, convs: list[_Conv]) -> fx.Node:
    """In the dtype of the convolution, which under autocast is not that of its operands."""

    def call(target: Any, *args: Any) -> fx.Node:
        return call_like(graph, node, target, args)

    def cast(value: fx.Node, dtype: torch.dtype) -> fx.Node:
        return value if value_of(value).dtype == dtype else call(aten.to.dtype, value, dtype)

    dtype = value_of(node).dtype
    tokens, added = call(aten.transpose.int, cast(x, dtype), 1, 2), None
    for conv in convs:
        added = _added(call, added, conv)
        bias = None if added is None or conv is not convs[-1] else cast(added, dtype)
        tokens = _convolved(graph, conv, tokens, cast(conv.weight, dtype), bias)
    return call(aten.transpose.int, tokens, 1, 2)


def _added(call: Any, before: fx.Node | None, conv: _Conv) -> fx.Node | None:
    """``(E,)``, what a convolution adds to all tokens where what it reads has ``before`` added to all."""
    if before is None:
        return conv.bias
    exact = torch.promote_types(value_of(conv.node).dtype, torch.float32)
    taps = call(aten.sum.dim_IntList, call(aten.to.dtype, conv.weight, exact), [2])
    apart = call(aten.unflatten.int, taps, 0, [conv.groups, -1])
    of_groups = call(aten.unflatten.int, call(aten.to.dtype, before, exact), 0, [conv.groups, 1, -1])
    made = call(aten.flatten.using_ints, call(aten.sum.dim_IntList, call(aten.mul.Tensor, apart, of_groups), [2]))
    return made if conv.bias is None else call(aten.add.Tensor, made, conv.bias)


def _convolved(graph: fx.Graph, conv: _Conv, tokens: fx.Node, weight: fx.Node, bias: fx.Node | None) -> fx.Node:
    """``tokens (B, L, D)``"""

    def call(target: Any, *args: Any) -> fx.Node:
        return call_like(graph, conv.node, target, args)

    outputs, channels, _ = value_of(weight).shape
    if channels > 1:
        return conv_across_channels(graph, conv.node, tokens, weight, bias, conv.step, conv.groups)
    if outputs > conv.groups:  # several of each channel
        tokens = call(aten.repeat_interleave.self_int, tokens, outputs // conv.groups, -1)
    taps = call(aten.squeeze.dim, weight, 1)
    if conv.step > 1:
        spread = call(aten.constant_pad_nd.default, call(aten.unsqueeze.default, taps, -1), [0, conv.step - 1])
        taps = call(aten.slice.Tensor, call(aten.flatten.using_ints, spread, 1), 1, 0, 1 - conv.step)
    both = call(torch.ops.packc.causal_conv1d.default, tokens, taps, bias, None, None, None, False)
    return call(operator.getitem, both, 0)


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
