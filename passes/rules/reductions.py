"""Reductions and other ops along given axes: over features always, over tokens only where padding adds nothing."""

from __future__ import annotations

from typing import Any

import torch

from packc.passes.asks import ZeroAtPadding
from packc.passes.axes import OTHER, Axis, Layout, Whole, covers_tokens, show, value_of
from packc.passes.reading import Call, NotTokenwise, PaddedNumel, Reading
from packc.passes.rules.registry import Op, first_is_zero, register_rule

aten = torch.ops.aten


def _dims(op: Op, rank: int) -> list[int]:
    """The reduced axes; every axis when none are named."""
    given = op.argument("dim", op.argument("dims"))
    if given is None or given == []:
        return list(range(rank))
    return [op.dim(d, rank) for d in (given if isinstance(given, (list, tuple)) else [given])]


def _keepdim(op: Op) -> bool:
    return bool(op.argument("keepdim", default=False))


def _reduced(layout: Layout, dims: list[int], keepdim: bool) -> Layout:
    if keepdim:
        return tuple(OTHER if axis in dims else kind for axis, kind in enumerate(layout))
    return tuple(kind for axis, kind in enumerate(layout) if axis not in dims)


@register_rule(
    aten.mean.default,
    aten.mean.dim,
    aten.sum.default,
    aten.sum.dim_IntList,
    zero=first_is_zero,
)
def sum_or_mean(op: Op) -> Reading:
    """Over features as it stands; over all tokens where padding is known to be zero."""
    x = op.args[0]
    layout = op.layout(x)
    if layout is None:
        raise NotTokenwise("reduces a value without token axes")
    dims = _dims(op, len(layout))
    gone = [layout[d] for d in dims if layout[d] is not OTHER]
    if not gone:
        return Reading(_reduced(layout, dims, _keepdim(op)), {x: layout})
    if gone == [Axis.FLAT] or (Axis.TOKENS not in gone and len(gone) < 2):
        raise NotTokenwise(f"reduces the {gone[0].value} axis of {show(layout)}")
    reading = Reading(Whole.SUM, {x: layout}, asks=[ZeroAtPadding(x)])
    if op.target in (aten.mean.default, aten.mean.dim):
        if dims != list(range(len(layout))) or _keepdim(op):
            raise NotTokenwise("takes the mean over tokens and leaves an axis")
        if not all(
            isinstance(size, int) for kind, size in zip(layout, value_of(x).shape, strict=True) if kind is OTHER
        ):
            raise NotTokenwise("takes the mean over features of symbolic size")
        total = Call(aten.sum.default, (x,), {"dtype": op.node.kwargs.get("dtype")})
        reading.call = Call(aten.div.Scalar, (total, PaddedNumel(x)), {})
    return reading


@register_rule(
    aten.amax.default,
    aten.amin.default,
    aten.prod.dim_int,
    zero=first_is_zero,
)
@register_rule(
    aten.var.correction,
    aten.var_mean.correction,
    aten.var_mean.dim,
    aten.var.dim,
    aten.std.correction,
    aten.std.dim,
    aten.argmax.default,
    aten.argmin.default,
    aten.max.dim,  # where all are zero, any may be the largest
    aten.min.dim,
    aten.all.dim,
    aten.any.dim,
    aten.logsumexp.default,
    aten.norm.ScalarOpt_dim,
    aten.linalg_vector_norm.default,
)
def reduction(op: Op) -> Reading:
    """Over features only."""
    x = op.args[0]
    layout = op.layout(x)
    if layout is None:
        raise NotTokenwise("reduces a value without token axes")
    dims = _dims(op, len(layout))
    op.refuse_token_axes(dims, layout)
    return _results(op, _reduced(layout, dims, _keepdim(op)), x, layout)


@register_rule(
    aten.cumsum.default,
    aten.cumprod.default,
    aten.flip.default,
    aten.roll.default,
    aten.glu.default,
    aten.narrow.default,
    zero=first_is_zero,
)
@register_rule(
    aten.softmax.int,
    aten._softmax.default,
    aten.log_softmax.int,
    aten._log_softmax.default,
    aten.logcumsumexp.default,
    aten.sort.default,
    aten.sort.stable,
    aten.argsort.default,
    aten.argsort.stable,
    aten.topk.default,
    aten.pad.default,
    aten.constant_pad_nd.default,
)
def along_features(op: Op) -> Reading:
    """Works along given axes, which must be features; the others are untouched."""
    x = op.args[0]
    layout = op.layout(x)
    if not covers_tokens(layout) or layout is None:
        raise NotTokenwise("works on a value without token axes")
    if op.target in (aten.pad.default, aten.constant_pad_nd.default):
        pads = op.args[1]
        dims = [len(layout) - 1 - i // 2 for i, pad in enumerate(pads) if pad != 0]
    else:
        dims = _dims(op, len(layout))
    op.refuse_token_axes(dims, layout)
    return _results(op, layout, x, layout)


@register_rule(
    aten.layer_norm.default,
    aten.native_layer_norm.default,
    aten.rms_norm.default,
)
def normalization(op: Op) -> Reading:
    """Over the trailing ``normalized_shape`` axes."""
    x, normalized = op.args[:2]
    op.only_labelled(x)
    layout = op.layout(x)
    if layout is None:
        raise NotTokenwise("normalises a value without token axes")
    op.refuse_token_axes(list(range(len(layout) - len(normalized), len(layout))), layout)
    if op.target is aten.native_layer_norm.default:
        statistics = _reduced(layout, list(range(len(layout) - len(normalized), len(layout))), keepdim=True)
        return Reading([layout, statistics, statistics], {x: layout})
    return Reading(layout, {x: layout})


def _results(op: Op, out: Layout, x: Any, layout: Layout) -> Reading:
    results = value_of(op.node)
    several = isinstance(results, (tuple, list))
    return Reading([out] * len(results) if several else out, {x: layout})
