"""The order of axes in memory is laid down where Inductor, which does not know T, would get it wrong (torch 2.13).

It lays out what it computes as it likes, and brings what is saved for the backward into the strides that this expects;
but not where they depend on a size that nobody knows, and then the backward refuses its inputs. Contiguous values come
out so anyway, but those that it computes in their place in what they are joined to; others do not, as heads that were
transposed before they were computed with, and in torch 2.11 parts of what is computed, of which each may be computed by
itself.

And a value with a single channel, (1, 1, T, D), it takes for an image with channels last, of which it asks the sizes.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from packc.private_torch import private_torch

_lib = torch.library.Library("packc", "FRAGMENT")
_lib.define("keep_strides(Tensor x) -> Tensor")
_lib.impl("keep_strides", lambda x: x.clone(), "CompositeExplicitAutograd")
torch.library.register_fake(
    "packc::keep_strides", lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device), lib=_lib
)
_OP = torch.ops.packc.keep_strides.default


def keep_strides(gm: fx.GraphModule) -> None:
    """Hold the axes of such values in the order in which they were traced, in a graph that Inductor will compile."""
    outputs = filter(_has_unknown_strides, gm.graph.output_node().all_input_nodes)
    bases = [
        base for node in outputs if not _is_in_order(base := _base(node)) or _is_joined(base) or _skips_memory(node)
    ]
    seen_through = [node for node in gm.graph.nodes if _looks_like_an_image(node) and any(map(_is_view, node.users))]
    held = [node for node in dict.fromkeys([*bases, *seen_through]) if node.op == "call_function"]
    if not held:
        return
    _lower()
    for node in held:
        with gm.graph.inserting_after(node):
            kept = gm.graph.call_function(_OP, (node,))
        kept.meta = dict(node.meta)
        node.replace_all_uses_with(kept, delete_user_cb=lambda user, kept=kept: user is not kept)
    gm.recompile()


def _has_unknown_strides(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and any(
        isinstance(stride, torch.SymInt) and stride.node.hint is None for stride in value.stride()
    )


def _looks_like_an_image(node: fx.Node) -> bool:
    if _is_view(node) or not _has_unknown_strides(node):
        return False
    value = node.meta["val"]
    return value.ndim in (4, 5) and value.shape[1] == 1


def _is_view(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.is_view


def _base(node: fx.Node) -> fx.Node:
    while _is_view(node) or (node.target is operator.getitem and _is_view(node.all_input_nodes[0])):
        node = node.all_input_nodes[0]
    return node


def _is_in_order(node: fx.Node) -> bool:
    order = _order(node)
    return order == sorted(order, reverse=True)


def _skips_memory(node: fx.Node) -> bool:
    """Whether between its entries there are some of what it is a part of."""
    value = node.meta["val"]
    axes = sorted((_known(stride), _known(size)) for stride, size in zip(value.stride(), value.shape, strict=True))
    dense = 1
    for stride, size in axes:
        if size > 1:
            if stride != dense:
                return True
            dense *= size
    return False


def _is_joined(node: fx.Node) -> bool:
    return any(
        user.target is torch.ops.aten.cat.default or (_is_view(user) and _is_joined(user)) for user in node.users
    )


def _order(node: fx.Node) -> list[int]:
    """Rank of each axis by its stride, the smallest first: Inductor's stride order."""
    value = node.meta["val"]
    strides = [_known(stride) for stride in value.stride()]
    # Axes of size one may lie anywhere; among equals the last is the innermost.
    by_stride = sorted(range(value.ndim), key=lambda axis: (strides[axis], -axis))
    return [by_stride.index(axis) for axis in range(value.ndim)]


def _known(stride: int | torch.SymInt) -> int:
    """A number in the place of a stride: any size will do for T, larger than what it is compared with."""
    if isinstance(stride, int):
        return stride
    expression = stride.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, 2**20)))


def _lower() -> None:
    """Tell Inductor, once, what the op means."""
    with private_torch():
        from torch._inductor import ir
        from torch._inductor.lowering import lowerings, register_lowering
        from torch._inductor.virtualized import V
    if _OP not in lowerings:

        def lower(x: ir.TensorBox) -> ir.IRNode:
            return ir.ExternKernel.require_stride_order(x, _order(V.graph.current_node))

        register_lowering(_OP, type_promotion_kind=None)(lower)
