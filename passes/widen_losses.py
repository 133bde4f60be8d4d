"""Losses on ``logits[:, :-1]`` become losses on all logits, with the label that the loss ignores where one was dropped.

Next-token losses shift by dropping the last logits and the first labels. Cut along the sequence, logits of different
rows no longer line up with the pack; the same loss over whole rows does:

    cross_entropy(logits[:, :-1], labels[:, 1:])  ->  cross_entropy(logits, cat([labels[:, 1:], ignore_index], 1))

Equal for reductions that skip ignored labels (mean and sum), in value and in gradient; losses of every token are cut.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from packc.passes.arguments import argument
from packc.passes.axes import same_size, value_of
from packc.passes.cut_late import left_out
from packc.passes.graph import Graph, call_like
from packc.passes.outlined import is_random
from packc.passes.place_wise import is_entrywise

aten = torch.ops.aten

_LOSSES = {aten.cross_entropy_loss.default, aten.nll_loss_nd.default}
_FLATTENS = {aten.view.default, aten.reshape.default, aten.flatten.using_ints}


def widen_losses(graph: Graph) -> Graph:
    """Rewrite every loss whose logits ``(B, L, C)`` were sliced along L on the way; no-op elsewhere."""
    gm, changed = graph.gm, False
    for node in list(gm.graph.nodes):
        if node.target not in _LOSSES or value_of(node.args[1]).is_floating_point():  # shares of classes are no labels
            continue
        chain = _chain_to_slice(node.args[0])
        if chain is None:
            continue
        sliced, steps = chain
        with gm.graph.inserting_before(node):
            logits = _replay(gm, sliced.args[0], steps)
            flat = value_of(logits).ndim == 2
            labels = _padded_labels(gm, node, sliced, flat=flat)
            loss = call_like(gm.graph, node, node.target, (logits, labels, *node.args[2:]), node.kwargs)
            if argument(node, "reduction") == 0:
                loss = _cut(gm, loss, sliced, flat=flat)
        node.replace_all_uses_with(loss)
        changed = True
    if changed:
        gm.graph.eliminate_dead_code()
        gm.recompile()
    return graph


def _chain_to_slice(logits: Any) -> tuple[fx.Node, list[fx.Node]] | None:
    """The slice of (B, L, C) along L that the logits come from, and the ops after it, first to last."""
    steps: list[fx.Node] = []
    node = logits
    while isinstance(node, fx.Node) and node.op == "call_function":
        if node.target is aten.slice.Tensor:
            x = node.args[0]
            full, part = value_of(x).shape, value_of(node).shape
            dim, step = argument(node, "dim"), argument(node, "step")
            along_length = len(full) == 3 and dim in (1, -2) and step == 1
            if along_length and not same_size(full[1], part[1]):
                rows_alone = left_out(node) is not None and _keep_positions_apart(steps[::-1])
                return (node, steps[::-1]) if rows_alone else None
        elif node.target in _FLATTENS:
            if value_of(node).ndim != 2 or not same_size(value_of(node).shape[1], value_of(node.args[0]).shape[-1]):
                return None
        elif node.target not in (aten.transpose.int, aten.log_softmax.int) and not _is_entrywise_of_one(node):
            return None
        steps.append(node)
        node = node.args[0]
    return None


def _is_entrywise_of_one(node: fx.Node) -> bool:
    """Whether an op computes each entry of its first argument's alone, and draws nothing."""
    return is_entrywise(node) and node.all_input_nodes == [node.args[0]] and not is_random(node)


def _keep_positions_apart(steps: list[fx.Node]) -> bool:
    """Whether each position of (B, L, C) is computed by itself up to the loss, whose classes are not positions."""
    positions: int | None = 1  # None: flattened with rows
    for step in steps:
        dims: Any = step.args[1:3]
        if step.target is aten.transpose.int:
            a, b = (dim % value_of(step).ndim for dim in dims)
            positions = {a: b, b: a}.get(positions, positions)
        elif step.target in _FLATTENS and value_of(step.args[0]).ndim == 3:
            if positions == 2:
                return False
            positions = None
        elif step.target is aten.log_softmax.int:
            along = dims[0] % value_of(step).ndim
            if along == (0 if positions is None else positions):
                return False
    return positions in (None, 2)


def _replay(gm: fx.GraphModule, x: Any, steps: list[fx.Node]) -> fx.Node:
    for step in steps:
        if step.target is aten.slice.Tensor:
            continue  # takes all of another axis
        if step.target in _FLATTENS:
            x = call_like(gm.graph, step, aten.reshape.default, (x, [-1, value_of(x).shape[-1]]))
        else:
            x = call_like(gm.graph, step, step.target, (x, *step.args[1:]), step.kwargs)
    return x


def _cut(gm: fx.GraphModule, losses: fx.Node, sliced: fx.Node, *, flat: bool) -> fx.Node:
    """Of the losses of all positions, those that there were."""
    if flat:
        batch = _size(gm, value_of(sliced).shape[0], like=losses)
        losses = call_like(gm.graph, losses, aten.reshape.default, (losses, [batch, -1]))
    losses = call_like(gm.graph, losses, aten.slice.Tensor, (losses, 1, *sliced.args[2:]))
    return call_like(gm.graph, losses, aten.reshape.default, (losses, [-1])) if flat else losses


def _padded_labels(gm: fx.GraphModule, loss: fx.Node, sliced: fx.Node, *, flat: bool) -> fx.Node:
    front, back = left_out(sliced)  # type: ignore[misc]
    ignore_index = argument(loss, "ignore_index")
    batch = _size(gm, value_of(sliced).shape[0], like=loss)
    rows = call_like(gm.graph, loss, aten.reshape.default, (loss.args[1], [batch, -1]))
    # Not constant_pad_nd, whose result has the very length of the example on torch 2.11.
    parts = [rows]
    if front:
        parts.insert(0, call_like(gm.graph, loss, aten.new_full.default, (rows, [batch, front], ignore_index)))
    if back:
        parts.append(call_like(gm.graph, loss, aten.new_full.default, (rows, [batch, back], ignore_index)))
    labels = call_like(gm.graph, loss, aten.cat.default, (parts, 1))
    return call_like(gm.graph, loss, aten.reshape.default, (labels, [-1])) if flat else labels


def _size(gm: fx.GraphModule, size: Any, *, like: fx.Node) -> Any:
    """A size as an argument: read off an input, so that labels never seem to depend on what the model computes."""
    if isinstance(size, int):
        return size
    for node in gm.graph.find_nodes(op="placeholder"):
        value = value_of(node)
        for axis in range(value.ndim if isinstance(value, Tensor) else 0):
            if same_size(value.shape[axis], size):
                return call_like(gm.graph, like, aten.sym_size.int, (node, axis))
    raise AssertionError(f"no input has an axis of size {size}")
