"""How much there is to do for a token, and in attention for a pair of tokens: by which ranks' parts are cut evenly."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import fx

from packc.passes.axes import hint_of, value_of
from packc.passes.graph import Graph
from packc.passes.overlap.costs import flops_of
from packc.passes.pack_attention import packed_attention

aten = torch.ops.aten


class Pairs(NamedTuple):
    """Of attention layers that show tokens the same."""

    flops: int
    """For each pair of a token and one that it sees."""
    causal: bool
    window: int | None


class Work(NamedTuple):
    """FLOPs of a forward. What moves bytes alone is left out, and so are experts."""

    token: int
    """For each token, whatever its document."""
    pairs: list[Pairs]


def work_of(graph: Graph) -> Work:
    """Of the graph's packed form; to be asked before it is written."""
    attention = dict(packed_attention(graph))
    tokens = math.prod(map(hint_of, graph.sizes))
    total = sum(_flops(node) for node in graph.forms.packed if node not in attention and node.op == "call_function")
    kinds: dict[tuple[bool, int | None], int] = {}
    for node, call in attention.items():
        given = dict(zip(call.arguments, call.args, strict=True))
        kind = given["causal"], given["window"]
        (_, heads, _, of_keys), of_values = value_of(node.args[0]).shape, value_of(node).shape[-1]
        kinds[kind] = kinds.get(kind, 0) + 2 * int(heads) * (int(of_keys) + int(of_values))
    return Work(max(1, round(total / max(tokens, 1))), [Pairs(flops, *kind) for kind, flops in kinds.items()])


def _flops(node: fx.Node) -> float:
    if node.target in (aten.linear.default, aten.matmul.default):  # of which torch's counter sees the products inside
        shared = hint_of(value_of(node.args[0]).shape[-1])
        return 2.0 * shared * math.prod(map(hint_of, value_of(node).shape))
    return flops_of(node)
