"""Attention written out as two products and a softmax becomes one op, which has a packed form.

    softmax(q @ k^T * scale + mask) @ v  ->  scaled_dot_product_attention(q, k, v, mask, scale=scale)

Equal up to rounding: the op's softmax is in fp32 whatever its inputs are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from packc.passes.axes import is_tensor, value_of
from packc.passes.graph import Graph, call_like

aten = torch.ops.aten

SOFTMAX = {aten.softmax.int, aten._softmax.default, aten._safe_softmax.default}
_SCALES = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar}
_CASTS = {aten.to.dtype, aten.alias.default, aten.contiguous.default}


class _Scores(NamedTuple):
    q: fx.Node
    transposed: fx.Node  # (B, heads, channels, L)
    scale: float
    scaled: list[fx.Node]
    """Further scales, last to first, by numbers that the graph is given."""
    mask: fx.Node | None


def written_out_attention(graph: Graph) -> Graph:
    """Put ``scaled_dot_product_attention`` in the place of every such product; no-op elsewhere."""
    gm, changed = graph.gm, False
    for node in list(gm.graph.nodes):
        scores = _scores(node.args[0]) if node.target in SOFTMAX and node.args[1] in (-1, 3) else None
        product = _product(node)
        if scores is None or product is None:
            continue
        out, dropout = product
        with gm.graph.inserting_before(out):
            q, k = scores.q, call_like(gm.graph, out, aten.transpose.int, (scores.transposed, -2, -1))
            for each in reversed(scores.scaled):
                q = call_like(gm.graph, out, each.target, (q, each.args[1]))
            mask = scores.mask
            if mask is not None and value_of(mask).dtype != value_of(q).dtype:  # truths too, which were added
                mask = call_like(gm.graph, out, aten.to.dtype, (mask, value_of(q).dtype))
            attention = call_like(
                gm.graph,
                out,
                aten.scaled_dot_product_attention.default,
                (q, k, out.args[1], mask, dropout, False),
                {"scale": scores.scale},
            )
        attention.meta["val"] = value_of(out)  # whose dtype is autocast's
        out.replace_all_uses_with(attention)
        changed = True
    if changed:
        gm.graph.eliminate_dead_code()
        gm.recompile()
    return graph


def _scores(node: Any) -> _Scores | None:
    """What is under a softmax, back to ``q @ k^T``."""
    scale, scaled, mask = 1.0, list[fx.Node](), None
    while _has_one_reader(node):
        args = node.args
        if node.target is aten.matmul.default:
            return _Scores(args[0], args[1], scale, scaled, mask) if value_of(node).ndim == 4 else None
        if node.target in (aten.mul.Tensor, aten.mul.Scalar) and isinstance(args[1], (int, float)):
            scale *= args[1]
        elif node.target in (aten.div.Tensor, aten.div.Scalar) and isinstance(args[1], (int, float)):
            scale /= args[1]
        elif is_scaled(node):
            scaled.append(node)
        elif (
            node.target is aten.add.Tensor
            and mask is None
            and (scale, scaled) == (1.0, [])
            and is_tensor(args[1])
            and not node.kwargs
        ):
            mask = args[1]
        elif not is_cast(node):
            return None
        node = args[0]
    return None


def is_cast(node: fx.Node) -> bool:
    """Whether a node rounds at most as numbers that are computed with are rounded: not to integers."""
    return node.target in _CASTS and value_of(node).is_floating_point()


def is_scaled(node: fx.Node) -> bool:
    """Whether a node multiplies or divides by one number."""
    if node.target not in _SCALES:
        return False
    by = node.args[1]
    # Of a model's own number Dynamo makes an input when another model, or layer, has another.
    return isinstance(by, (int, float)) or (isinstance(by, fx.Node) and not is_tensor(by))


def _product(node: fx.Node) -> tuple[fx.Node, float] | None:
    """``probabilities @ v``, and how much of the probabilities is dropped on the way."""
    dropout = 0.0
    while _has_one_reader(node):
        (user,) = node.users
        if user.args[0] is not node:
            return None
        if user.target is aten.matmul.default:
            return user, dropout
        if user.target is aten.dropout.default and dropout == 0.0:
            dropout = user.args[1] if user.args[2] else 0.0  # type: ignore[assignment]
        elif not is_cast(user):
            return None
        node = user
    return None


def _has_one_reader(node: Any) -> bool:
    return is_tensor(node) and len(node.users) == 1
