"""Tensors of numbers written in the model, ``torch.tensor(4)``, become ops that make them, of sizes alone.

Of tensors that a graph holds, AOTAutograd takes only those that Dynamo told it of.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, fx

from packc.fake_tensors import detect_fake_mode
from packc.passes.graph import Graph, call_like
from packc.passes.reasons import NotPackable

aten = torch.ops.aten

# What tracing writes around such a tensor, so that nobody writes to the one that the graph holds.
_COPIES = {aten.lift_fresh_copy.default, aten.detach_.default, aten.detach.default}


_MOST_NUMBERS = 64

# ``x.new_zeros(sizes)`` asks x for nothing but its dtype and device.
_OF_ANOTHER = {
    aten.new_empty.default: aten.empty.memory_format,
    aten.new_zeros.default: aten.zeros.default,
    aten.new_ones.default: aten.ones.default,
    aten.new_full.default: aten.full.default,
}


def constants(graph: Graph) -> Graph:
    """Replace every tensor that the graph holds, together with its copies, and those made like another of its dtype.

    Raises:
        NotPackable: one has too many numbers to be written out.
    """
    gm = graph.gm
    for node in gm.graph.find_nodes(op="get_attr"):
        value = getattr(gm, str(node.target))
        if not isinstance(value, Tensor):
            continue
        with gm.graph.inserting_before(node):
            made = _made(graph, node, value)
        made.meta = dict(node.meta)
        for copy in _copies(node):
            copy.replace_all_uses_with(made)
            gm.graph.erase_node(copy)
    for like, plain in _OF_ANOTHER.items():
        for node in gm.graph.find_nodes(op="call_function", target=like):
            node.target, node.args = plain, node.args[1:]
            node.kwargs = {"dtype": node.meta["val"].dtype, "device": node.meta["val"].device, **node.kwargs}
    gm.recompile()
    return graph


def _made(graph: Graph, like: fx.Node, value: Tensor) -> fx.Node:
    make = graph.gm.graph.call_function
    of: dict[str, Any] = {"dtype": value.dtype, "device": value.device}
    if value.ndim == 0:
        return make(aten.scalar_tensor.default, (value.item(),), of)
    if value.numel() == 0:
        return make(aten.zeros.default, (list(value.shape),), of)
    flat = _numbers(value) if value.numel() <= _MOST_NUMBERS else None
    if flat is None:
        raise NotPackable(f"the model makes a tensor of numbers, of shape {tuple(value.shape)}")
    with detect_fake_mode(graph.inputs) or contextlib.nullcontext():
        numbers = [call_like(graph.gm.graph, like, aten.scalar_tensor.default, (each,), of) for each in flat]
        row = call_like(graph.gm.graph, like, aten.stack.default, (numbers,))
        return call_like(graph.gm.graph, like, aten.reshape.default, (row, list(value.shape)))


def _numbers(value: Tensor) -> list[float] | None:
    try:
        return value.flatten().tolist()
    except RuntimeError:  # of each sample of a batch, in what vmap calls
        return None


def _copies(node: fx.Node) -> list[fx.Node]:
    """A tensor and its copies, the last first."""
    found = [node]
    for each in found:
        found.extend(user for user in each.users if user.target in _COPIES)
    return found[::-1]
