"""In-place ops on fresh values become functional ones: ``x += y`` is ``x = x + y``, wherever ``x`` is read after it.

A write through a view, ``x[..., :2] = y``, is a new ``x`` too, with the part put in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from packc.passes.axes import same_size, value_of
from packc.passes.graph import Graph, call_like, is_item
from packc.passes.row_wise import BEGIN
from packc.private_torch import private_torch

with private_torch():
    _switches_gradients = torch._C._set_grad_enabled

aten = torch.ops.aten


def _put_slice(whole: fx.Node, part: fx.Node, *args: Any) -> tuple[OpOverload, tuple[Any, ...]]:
    if all(map(same_size, value_of(whole).shape, value_of(part).shape)):
        return aten.alias.default, (part,)  # x[:, :, 1:] takes all of two axes, one after the other
    return aten.slice_scatter.default, (whole, part, *args)


Put = Callable[..., tuple[OpOverload, tuple[Any, ...]]]
"""(the whole, the changed part, the view's arguments) -> the call that gives the whole with the part in its place."""
_PUT_BACK: dict[OpOverload, Put] = {
    aten.slice.Tensor: _put_slice,
    aten.select.int: lambda whole, part, *args: (aten.select_scatter.default, (whole, part, *args)),
    aten.transpose.int: lambda whole, part, *args: (aten.transpose.int, (part, *args)),
    aten.unsqueeze.default: lambda whole, part, dim: (aten.squeeze.dim, (part, dim)),
    aten.alias.default: lambda whole, part: (aten.alias.default, (part,)),
}


def functional(graph: Graph) -> Graph:
    """Replace in-place ops that write to a value made in the graph, or to a view of one; no-op elsewhere.

    The passes after this one may give a value two forms, padded and packed; a write would reach only one of them. What
    stays in place here (writes to inputs, to views of other kinds) is refused there.
    """
    gm = graph.gm
    changed, without_gradient = False, _without_gradient(gm)
    for node in list(gm.graph.nodes):
        views = _views_written(node.args[0]) if _is_in_place(node) else None
        # What is written where there are no gradients keeps the one it has; a new value would have none.
        if views is not None and (node not in without_gradient or views[0] in without_gradient):
            changed |= _replace(gm.graph, node, views)
    if changed:
        gm.graph.eliminate_dead_code()
        gm.recompile()
    return graph


def _without_gradient(gm: fx.GraphModule) -> set[fx.Node]:
    """The nodes in regions of no_grad."""
    found, enabled = set[fx.Node](), True
    for node in gm.graph.nodes:
        if node.target is _switches_gradients:
            enabled = bool(node.args[0])
        elif not enabled:
            found.add(node)
    return found


def _is_in_place(node: fx.Node) -> bool:
    return (
        isinstance(node.target, OpOverload)
        and node.target._schema.is_mutable
        and node.target._schema.name.endswith("_")
        and isinstance(node.args[0], fx.Node)
    )


def _views_written(written: Any) -> list[fx.Node] | None:
    """The views from a fresh value, which is the first, to the written one; None if that is no part of a fresh one."""
    views = [written]
    while isinstance(views[0], fx.Node) and views[0].target in _PUT_BACK:
        views.insert(0, views[0].args[0])
    return views if _is_fresh(views[0]) else None


def _is_fresh(value: object) -> bool:
    """Made by an op that returns new memory."""
    if isinstance(value, fx.Node) and is_item(value):
        value = value.args[0]  # one result of several
    if not isinstance(value, fx.Node) or not isinstance(value.target, OpOverload):
        return False
    if value.target is BEGIN:
        return False  # a function of rows is given the caller's own
    return all(result.alias_info is None for result in value.target._schema.returns)


def _replace(graph: fx.Graph, node: fx.Node, views: list[fx.Node]) -> bool:
    """Write ``node`` as a new value for the fresh one, and anew every view of it that is read later."""

    def call(target: OpOverload, args: tuple[Any, ...], kwargs: Any = None) -> fx.Node:
        with graph.inserting_before(node):
            return call_like(graph, node, target, args, kwargs)

    aliases = list(_aliases(views[0], node))
    if any(alias.target not in _PUT_BACK and _read_after(alias, node) for alias in aliases):
        return False
    part = _written(node, call)
    if part is None:
        return False
    for whole, view in zip(views[-2::-1], views[:0:-1], strict=True):
        part = call(*_PUT_BACK[view.target](whole, part, *view.args[1:]))  # type: ignore[index]
    anew = {views[0]: part}
    for alias in aliases:
        if alias in views or _read_after(alias, node):
            # Of the new value, for what is written next may be seen through it.
            anew[alias] = call(alias.target, (anew[alias.args[0]], *alias.args[1:]), alias.kwargs)  # type: ignore[arg-type,index]
    anew[node] = anew[views[-1]]
    for old, new in anew.items():
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user > node)
    graph.erase_node(node)
    return True


def _aliases(base: fx.Node, node: fx.Node) -> Iterator[fx.Node]:
    """The values before ``node`` that share memory with ``base``, in order."""
    found = {base}
    queue = [base]
    while queue:
        for user in queue.pop().users:
            if user < node and user not in found and _may_alias(user):
                found.add(user)
                queue.append(user)
    return iter(sorted(found - {base}))


def _may_alias(node: fx.Node) -> bool:
    if not isinstance(node.target, OpOverload):
        return node.op != "output"
    return any(result.alias_info is not None for result in node.target._schema.returns)


def _read_after(value: fx.Node, node: fx.Node) -> bool:
    """Whether a value or a view of it is read after ``node``."""
    return any(user > node or (user < node and _may_alias(user) and _read_after(user, node)) for user in value.users)


def _written(node: fx.Node, call: Callable[..., fx.Node]) -> fx.Node | None:
    """What an in-place op leaves in the value that it writes, noted to lie in memory as that does; None if no
    functional op gives it."""
    written, target = node.args[0], node.target
    before = value_of(written)
    assert isinstance(target, OpOverload)
    assert isinstance(before, Tensor)
    if target is aten.copy_.default:
        source: Any = node.args[1]
        if value_of(source).dtype != before.dtype:
            source = call(aten.to.dtype, (source, before.dtype))
        given = value_of(source)
        if given.device != before.device:
            return None
        added = before.ndim - given.ndim
        same = [added <= axis and same_size(size, given.shape[axis - added]) for axis, size in enumerate(before.shape)]
        if not all(same):
            sizes = [-1 if kept else size for kept, size in zip(same, before.shape, strict=True)]
            if not all(isinstance(size, int) for size in sizes):
                return None
            source = call(aten.expand.default, (source, sizes))
        # With memory of its own, as what was written has: it may be a result.
        copied = call(aten.clone.default, (source,), {"memory_format": torch.contiguous_format})
        copied.meta["val"] = before
        return copied
    overload = _functional_overload(target)
    if overload is None:
        return None
    part = call(overload, node.args, node.kwargs)
    after = value_of(part)
    # In place, the result keeps the dtype and the shape of what was written.
    if (after.dtype, after.ndim) != (before.dtype, before.ndim):
        return None
    part.meta["val"] = before
    return part


def _functional_overload(target: OpOverload) -> OpOverload | None:
    """``aten.add.Tensor`` for ``aten.add_.Tensor``, if it takes the same arguments."""
    namespace, name = target._schema.name.split("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    overload = getattr(packet, target._overloadname, None)
    if overload is None or overload._schema.is_mutable:
        return None
    names = [[argument.name for argument in each._schema.arguments] for each in (target, overload)]
    return overload if names[0] == names[1][: len(names[0])] else None
