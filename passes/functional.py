"""In-place ops on fresh values become functional ones: ``x += y`` is ``x = x + y`` where nobody holds another view."""

from __future__ import annotations

import torch
from torch import fx
from torch._ops import OpOverload

from packc.passes.graph import Graph, is_item
from packc.passes.row_wise import BEGIN


def functional(graph: Graph) -> Graph:
    """Replace in-place ops whose target was made in the graph and has no live alias; no-op elsewhere.

    The passes after this one may give a value two forms, padded and packed; a write would reach only one of them. What
    stays in place here (writes to inputs, to views) is refused there.
    """
    gm = graph.gm
    order = {node: position for position, node in enumerate(gm.graph.nodes)}
    for node in list(gm.graph.nodes):
        out_of_place = _functional_overload(node)
        if out_of_place is None or not _is_fresh(node.args[0]) or _has_other_alias(node, order):
            continue
        written = node.args[0]
        node.target = out_of_place
        written.replace_all_uses_with(node, delete_user_cb=lambda user, node=node: order[user] > order[node])
    gm.recompile()
    return graph


def _functional_overload(node: fx.Node) -> OpOverload | None:
    """``aten.add.Tensor`` for ``aten.add_.Tensor``, if it takes the same arguments."""
    target = node.target
    if not isinstance(target, OpOverload) or not target._schema.is_mutable:
        return None
    namespace, name = target._schema.name.split("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    overload = getattr(packet, target._overloadname, None) if name.endswith("_") else None
    if overload is None or overload._schema.is_mutable:
        return None
    names = [[argument.name for argument in each._schema.arguments] for each in (target, overload)]
    return overload if names[0] == names[1][: len(names[0])] else None


def _is_fresh(value: object) -> bool:
    """Made by an op that returns new memory."""
    if isinstance(value, fx.Node) and is_item(value):
        value = value.args[0]  # one result of several
    if not isinstance(value, fx.Node) or not isinstance(value.target, OpOverload):
        return False
    if value.target is BEGIN:
        return False  # a function of rows is given the caller's own
    return all(result.alias_info is None for result in value.target._schema.returns)


def _has_other_alias(node: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether a view of the written value was taken before the write."""
    written = node.args[0]
    assert isinstance(written, fx.Node)
    for user in written.users:
        if user is node or order[user] > order[node]:
            continue
        if not isinstance(user.target, OpOverload) or any(
            r.alias_info is not None for r in user.target._schema.returns
        ):
            return True
    # The result must have the shape and dtype of what was written: in place, it keeps both.
    before, after = written.meta["val"], node.meta["val"]
    return before.dtype != after.dtype or before.ndim != after.ndim
