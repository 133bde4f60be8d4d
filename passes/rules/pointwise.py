"""Ops that treat every element on its own: legal on packed values because a pack is only a choice of elements."""

from __future__ import annotations

import torch

from packc.passes.axes import OTHER, covers_tokens, is_tensor, same_size, value_of
from packc.passes.reading import Call, NotTokenwise, Reading
from packc.passes.rules.registry import (
    Op,
    both_are_zero,
    broadcast_layout,
    either_is_zero,
    first_is_zero,
    register_rule,
    register_zero,
)

aten = torch.ops.aten


# Ops tagged pointwise need no entry among the rules; that f(0) = 0 is nowhere but here. Not of sin: it is of positions,
# which would be taken for a mask of what they turn.
register_zero(
    first_is_zero,
    aten.neg.default,
    aten.abs.default,
    aten.silu.default,
    aten.gelu.default,
    aten.relu.default,
    aten.tanh.default,
    aten.sqrt.default,
    aten.square.default,
    aten.sign.default,
    aten.round.default,
    aten.nan_to_num.default,
    aten.hardswish.default,
    aten.expm1.default,
    aten.log1p.default,
    aten.div.Scalar,
)
register_zero(either_is_zero, aten.mul.Tensor, aten.mul.Scalar)
register_zero(both_are_zero, aten.add.Tensor, aten.sub.Tensor, aten.maximum.default, aten.minimum.default)
register_zero(lambda args, is_zero: all(map(is_zero, args[0])), aten.broadcast_tensors.default)
register_zero(lambda args, is_zero: is_zero(args[0]) and args[1] in (2, 3), aten.pow.Tensor_Scalar)
register_zero(lambda args, is_zero: is_zero(args[0]) and not is_zero(args[1]), aten.div.Tensor)


@register_rule(
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten._to_copy.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.dropout.default,
    aten.leaky_relu.default,  # not tagged as pointwise in torch 2.11
    zero=first_is_zero,
)
@register_rule(
    aten.lift_fresh_copy.default,
    aten.native_dropout.default,
    aten.bernoulli.default,
    aten.bernoulli.p,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.fill.Scalar,
    aten.fill.Tensor,
    aten.empty_like.default,
    aten.rand_like.default,
    aten.randn_like.default,
    aten.uniform.default,
    aten.exponential.default,
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
    aten.log_sigmoid.default,
    aten.__and__.Tensor,
    aten.__or__.Tensor,
)
def pointwise(op: Op) -> Reading:
    """Elementwise with broadcasting; draws of random ops are made for real tokens only."""
    operands = op.tensors()
    results = value_of(op.node)
    shape = (results[0] if isinstance(results, (tuple, list)) else results).shape
    layout, needs = broadcast_layout(op, operands, shape)
    if isinstance(results, (tuple, list)):
        return Reading([layout] * len(results), needs)
    return Reading(layout, needs)


@register_rule(aten.broadcast_tensors.default)
def broadcast_tensors(op: Op) -> Reading:
    """Each operand as large as all; one that is already is the value itself, which others may read as what it is."""
    for operand in op.tensors():
        whole = all(map(same_size, value_of(operand).shape, value_of(op.node)[0].shape))
        if not covers_tokens(op.layout(operand)) and value_of(operand).ndim == value_of(op.node)[0].ndim and whole:
            raise NotTokenwise(f"hands on {operand.name}, which has no token axes")
    return pointwise(op)


@register_rule(aten.embedding.default)
def embedding(op: Op) -> Reading:
    """Indices (...) -> (..., D): one row of the table per token."""
    weight, indices = op.args[:2]
    op.only_labelled(indices)
    layout = op.layout(indices)
    if len(op.args) > 3 and op.args[3]:
        raise NotTokenwise("scales gradients by how often an index occurs, in padding too (scale_grad_by_freq)")
    if not is_tensor(weight) or not covers_tokens(layout):
        raise NotTokenwise("indices have no token axes")
    return Reading((*layout, OTHER), {indices: layout})


@register_rule(aten.one_hot.default)
def one_hot(op: Op) -> Reading:
    """Indices (...) -> (..., classes)."""
    (indices, classes) = op.args
    layout = op.layout(indices)
    if classes == -1:
        raise NotTokenwise("the number of classes depends on the values of all tokens")
    return Reading((*layout, OTHER), {indices: layout})  # type: ignore[misc, dict-item]


@register_rule(aten.type_as.default, aten.to.other, zero=first_is_zero)
def cast_like(op: Op) -> Reading:
    """Only the other tensor's dtype counts."""
    x, other = op.args[:2]
    layout = op.layout(x)
    if not covers_tokens(layout) or value_of(other).device != value_of(x).device:
        raise NotTokenwise("casts a value without token axes, or moves it to another device")
    return Reading(layout, {x: layout}, Call(aten.to.dtype, (x, value_of(other).dtype), {}))
