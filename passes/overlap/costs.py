"""How long a node of a graph takes, in seconds: from FLOPs, bytes and rates that are declared, not measured.

Ranks must find the same order, or their collectives would meet the wrong partners: what each measures of itself would
differ. Orders depend on ratios alone, and not much on them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from packc.private_torch import private_torch

with private_torch():
    from torch.utils._pytree import tree_map_only


class Rates(NamedTuple):
    """Of one device, and of the link between it and the others."""

    flops: float
    """A second, of products."""
    bytes: float
    """A second, of memory."""
    link: float
    """Bytes a second."""
    latency: float
    """Seconds of a collective of no bytes."""


RATES = {
    "cpu": Rates(5e10, 1e10, 1e9, 1e-4),
    "cuda": Rates(4e14, 3e12, 5e10, 2e-5),  # of an H100 in bf16, and of an InfiniBand link
}
TOKENS = 4096
"""For sizes that only a run can tell."""


def device_of(nodes: Iterable[fx.Node]) -> str:
    values = (node.meta.get("val") for node in nodes)
    devices = {x.device.type for x in values if isinstance(x, Tensor)}
    return "cuda" if "cuda" in devices else "cpu"


def seconds_of(node: fx.Node, rates: Rates) -> float:
    """Of a compute node: its products or the bytes that it reads and writes, whichever takes longer.

    What moves nothing takes no time: views, and Python's functions of sizes and of tuples.
    """
    if _is_view(node) or not isinstance(node.target, torch._ops.OpOverload):
        return 0.0
    moved = sum(map(bytes_of, {node, *node.all_input_nodes}))
    return max(flops_of(node) / rates.flops, moved / rates.bytes)


def seconds_of_collective(node: fx.Node, rates: Rates) -> float:
    return rates.latency + bytes_of(node) / rates.link


def bytes_of(node: fx.Node) -> int:
    """Of a node's results. A view has none of its own."""
    if _is_view(node):
        return 0
    value = node.meta.get("val")
    tensors: Iterable[Any] = value if isinstance(value, (list, tuple)) else [value]
    return sum(math.prod(map(_number, x.shape)) * x.dtype.itemsize for x in tensors if isinstance(x, Tensor))


def _is_view(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and (
        target.is_view or target is torch.ops.aten._unsafe_view.default
    )


def _number(size: int | torch.SymInt) -> int:
    if isinstance(size, int):
        return size
    known = size.node.hint
    if known is not None:
        return int(known)
    expression = size.node.expr
    return max(0, int(expression.subs(dict.fromkeys(expression.free_symbols, TOKENS))))


def flops_of(node: fx.Node) -> float:
    """Of products; 0 for what torch's counter has no formula of."""
    with private_torch():
        from torch.utils.flop_counter import flop_registry  # imports triton

    count: Callable[..., int] | None = flop_registry.get(getattr(node.target, "overloadpacket", None))
    if count is None:
        return 0.0
    shapes = tree_map_only(
        Tensor,
        lambda x: torch.Size(map(_number, x.shape)),
        fx.map_arg((node.args, node.kwargs, (node,)), lambda each: each.meta.get("val")),
    )
    args, kwargs, (result,) = shapes
    return float(count(*args, **kwargs, out_val=result))
