"""What ``varlen_attention`` is to be told so that it computes an attention that is written out, if it can compute it.

The node's graph is read from its result back to ``q @ k^T``. That it is attention at all, and where the mask comes in,
was seen to when it was outlined (``attention_as_written.py``); here every op on the way must have a name among the
arguments of ``varlen_attention``, or mean nothing to it. It computes scores, the cap and the softmax in fp32 at least.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from packc.passes.attention_as_written import DROPS, AsWritten, subtracts_largest
from packc.passes.axes import is_tensor, same_size, value_of
from packc.passes.written_out_attention import SOFTMAX, is_cast, is_scaled

aten = torch.ops.aten

_DIVISIONS = {aten.div.Tensor, aten.div.Scalar}


class VarlenForm(NamedTuple):
    scale: float
    softcap: float | None
    sinks: fx.Node | None
    """Of each head one, ``(1, heads, 1, 1)``, or of each query too, ``(B, heads, queries, 1)``."""
    biases: fx.Node | None
    """What is added to scores beside the mask, ``(B or 1, heads or 1, queries or 1, keys)``."""
    dropout_p: float
    dtype: torch.dtype
    """Of ``q @ k^T``, which is to be computed no worse."""


def varlen_form(node: fx.Node) -> VarlenForm | None:
    """Of a node whose target is an :class:`~packc.passes.attention_as_written.AsWritten`."""
    body: fx.Graph = node.target.body  # type: ignore[union-attr]
    given = dict(zip(body.find_nodes(op="placeholder"), node.args, strict=True))
    mask = list(given)[3]
    wide = value_of(node.args[0]).dtype
    ops = [each for each in body.nodes if each.op == "call_function"]
    if any(is_tensor(each) and value_of(each).dtype == torch.float64 != wide for each in ops):
        return None  # which would be computed in fp32
    softmax, dropout_p = _before_values(body.output_node().args[0].args[0])  # type: ignore[union-attr]
    if dropout_p is None:
        return None
    scores, joined = _before_softmax(softmax.args[0], mask)
    product = _products(scores)
    sinks = None if joined is None else _sinks(given[joined], value_of(node.args[0]).shape[1])
    if product is None or (joined is not None and sinks is None):
        return None
    scale, softcap, added, at = product
    biases = None if added is None else given.get(added)
    return VarlenForm(scale, softcap, sinks, biases, dropout_p, value_of(at).dtype)


def added_biases(node: fx.Node) -> list[fx.Node]:
    """By such a node, if it can be computed by ``varlen_attention``."""
    form = varlen_form(node) if isinstance(node.target, AsWritten) else None
    return [] if form is None or form.biases is None else [form.biases]


def _before_values(node: Any) -> tuple[fx.Node, float | None]:
    """The softmax behind the weights of values, and how much of these is dropped; None if that is done twice."""
    dropout_p: float | None = 0.0
    while node.target not in SOFTMAX:
        if node.target in DROPS and node.args[2] and node.args[1] != 0:
            dropout_p = node.args[1] if dropout_p == 0 else None
        node = node.args[0]
    return node, dropout_p


def _before_softmax(node: Any, mask: fx.Node) -> tuple[Any, fx.Node | None]:
    """The scores to which the mask is added, and the columns that are joined to them then."""
    joined = None
    while True:
        if node.target is aten.cat.default:
            node, joined = node.args[0]
        elif node.target is aten.add.Tensor:
            assert node.args[1] is mask, "the mask is the last that is added to scores"
            return node.args[0], joined
        else:
            assert is_cast(node) or subtracts_largest(node), f"{node.target} between a mask and its softmax"
            node = node.args[0]


def _products(node: Any) -> tuple[float, float | None, fx.Node | None, fx.Node] | None:
    """Scale and cap of scores, what is added to them, and the product that they are made of; None of others."""
    added = None
    while is_cast(node):
        node = node.args[0]
    if node.target is aten.add.Tensor:
        multiple, (node, added) = node.kwargs, node.args
        if added.op != "placeholder" or multiple:
            return None
    factors = [1.0]  # in front of tanh, if there is one, and behind it
    while node.target is not aten.matmul.default:
        if is_scaled(node) and isinstance(node.args[1], (int, float)) and node.args[1] != 0:
            factors[0] *= 1 / node.args[1] if node.target in _DIVISIONS else node.args[1]
        elif node.target is aten.tanh.default and len(factors) == 1:
            factors.insert(0, 1.0)
        elif not is_cast(node):
            return None
        node = node.args[0]
    if len(factors) == 1:
        return factors[0], None, added, node
    inner, cap = factors
    return (inner * cap, cap, added, node) if cap > 0 else None


def _sinks(column: Any, heads: int) -> fx.Node | None:
    """``(B, heads, L, 1)``, or what it was made of, if that is one number for each head; None of other shapes."""
    _, of_heads, _, columns = value_of(column).shape
    if not (same_size(of_heads, heads) and same_size(columns, 1)):
        return None
    source = column.args[0] if column.target is aten.expand.default else None
    return source if source is not None and tuple(value_of(source).shape) == (1, heads, 1, 1) else column
