"""Ops that treat every element on its own: legal on packed values because a pack is only a choice of elements."""

from __future__ import annotations

import torch

from packc.passes.axes import OTHER, covers_tokens, is_tensor, value_of
from packc.passes.rules.registry import NotTokenwise, Op, PackedForm, broadcast_layout, register_rule

aten = torch.ops.aten


@register_rule(
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten._to_copy.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten.dropout.default,
    aten.native_dropout.default,
    aten.bernoulli.default,
    aten.bernoulli.p,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.empty_like.default,
    aten.rand_like.default,
    aten.randn_like.default,
    aten.where.ScalarSelf,
    aten.where.ScalarOther,
    aten.where.Scalar,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.feature_alpha_dropout.default,
    aten.alpha_dropout.default,
    aten.rrelu.default,
    aten.hardswish.default,
    aten.selu.default,
    aten.mish.default,
)
def pointwise(op: Op) -> PackedForm:
    """Elementwise with broadcasting; draws of random ops are made for real tokens only."""
    operands = op.tensors()
    results = value_of(op.node)
    shape = (results[0] if isinstance(results, (tuple, list)) else results).shape
    layout, needs = broadcast_layout(op, operands, shape)
    if isinstance(results, (tuple, list)):
        return PackedForm([layout] * len(results), needs)
    return PackedForm(layout, needs)


@register_rule(aten.embedding.default)
def embedding(op: Op) -> PackedForm:
    """Indices (...) -> (..., D): one row of the table per token."""
    weight, indices = op.args[:2]
    op.only_labelled(indices)
    layout = op.layout(indices)
    if len(op.args) > 3 and op.args[3]:
        raise NotTokenwise("scales gradients by how often an index occurs, in padding too (scale_grad_by_freq)")
    if not is_tensor(weight) or not covers_tokens(layout):
        raise NotTokenwise("indices have no token axes")
    return PackedForm((*layout, OTHER), {indices: layout})


@register_rule(aten.one_hot.default)
def one_hot(op: Op) -> PackedForm:
    """Indices (...) -> (..., classes)."""
    (indices, classes) = op.args
    layout = op.layout(indices)
    if classes == -1:
        raise NotTokenwise("the number of classes depends on the values of all tokens")
    return PackedForm((*layout, OTHER), {indices: layout})  # type: ignore[misc, dict-item]


@register_rule(aten.type_as.default, aten.to.other)
def cast_like(op: Op) -> PackedForm:
    """Only the other tensor's dtype counts."""
    x, other = op.args[:2]
    layout = op.layout(x)
    if not covers_tokens(layout) or value_of(other).device != value_of(x).device:
        raise NotTokenwise("casts a value without token axes, or moves it to another device")
    return PackedForm(layout, {x: layout}, args=(x, value_of(other).dtype), target=aten.to.dtype)
