"""Ops that rearrange axes. Sizes among their arguments are axes: a form says how large one is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from packc.passes.axes import BATCH, FLAT, OTHER, SEQ, TOKENS, Axis, Layout, covers_tokens, same_size, show, value_of
from packc.passes.reading import Call, NotTokenwise, Reading
from packc.passes.rules.registry import Op, first_is_zero, register_rule

aten = torch.ops.aten


def _input(op: Op) -> tuple[Any, Layout, Any]:
    """The viewed operand, its layout and its padded shape."""
    x = op.args[0]
    layout = op.layout(x)
    if layout is None or not covers_tokens(layout):
        raise NotTokenwise("the viewed value has no token axes")
    return x, layout, value_of(x).shape


def _size(kind: Axis, size: Any) -> Any:
    """A size among arguments: of a token axis, the axis; what is left, if features are flattened with it."""
    return size if kind is OTHER else -1 if kind is FLAT else kind


@register_rule(
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    zero=first_is_zero,
)
def reshape(op: Op) -> Reading:
    """Anything that keeps the row-major order of elements, as a reshape to explicit sizes."""
    x, layout, shape = _input(op)
    out_shape = value_of(op.node).shape
    out = reshaped_layout(layout, shape, out_shape, op.batch, op.length)
    written = op.args[1] if op.target in (aten.view.default, aten.reshape.default, aten._unsafe_view.default) else None
    sizes = []
    for axis, (kind, size) in enumerate(zip(out, out_shape, strict=True)):
        if kind is OTHER and not isinstance(size, int):
            # A symbolic feature size: only the node that computed it can say it in the packed graph.
            if written is None:
                raise NotTokenwise(f"size {size} of axis {axis} is only implied")
            size = written[axis]
        sizes.append(_size(kind, size))
    # No view, even where the model has one: packed, a value may lie in memory in another way.
    return Reading(out, {x: layout}, Call(aten.reshape.default, (x, sizes), {}))


def reshaped_layout(layout: Layout, shape: Any, out_shape: Any, batch: Any, length: Any) -> Layout:
    """Follow axes through a row-major reshape by matching the shortest runs of axes with equal products.

    Raises :class:`NotTokenwise` where a token axis is split, or merged with features other than behind it.
    """
    out: list[Axis] = []
    i = j = 0
    while i < len(shape) or j < len(out_shape):
        # Rows and positions are joined and parted as such first: with one row, sizes alone could not tell.
        if layout[i : i + 2] == (BATCH, SEQ) and _starts_with(out_shape[j:], batch * length):
            if not _starts_with(out_shape[j:], batch, length):
                out.append(TOKENS)
                i, j = i + 2, j + 1
                continue
        elif layout[i : i + 1] == (TOKENS,) and _starts_with(out_shape[j:], batch, length):
            out += [BATCH, SEQ]
            i, j = i + 1, j + 2
            continue
        ni, nj = _shortest_match(layout, shape, out_shape, i, j)
        out += _regroup(layout[i:ni], shape[i:ni], out_shape[j:nj], batch, length)
        i, j = ni, nj
    if not covers_tokens(tuple(out)):
        raise NotTokenwise(f"{show(layout)} of {tuple(shape)} does not reshape to {tuple(out_shape)} axis by axis")
    return tuple(out)


def _starts_with(sizes: Any, *wanted: Any) -> bool:
    return len(sizes) >= len(wanted) and all(map(same_size, sizes, wanted))


def _shortest_match(layout: Layout, shape: Any, out_shape: Any, i: int, j: int) -> tuple[int, int]:
    # Features of size one are matched to nothing: they may come and go anywhere.
    left = i < len(shape) and layout[i] is OTHER and same_size(shape[i], 1)
    right = j < len(out_shape) and same_size(out_shape[j], 1)
    if left and not right:
        return i + 1, j
    if right and not (i < len(shape) and same_size(shape[i], 1)):
        return i, j + 1
    for total in range(2, len(shape) - i + len(out_shape) - j + 1):
        for ni in range(i + 1, min(len(shape), i + total - 1) + 1):
            nj = j + total - (ni - i)
            if nj <= len(out_shape) and same_size(_product(shape[i:ni]), _product(out_shape[j:nj])):
                return ni, nj
    raise NotTokenwise(f"cannot match {tuple(shape)} to {tuple(out_shape)} axis by axis")


def _product(sizes: Any) -> Any:
    result: Any = 1
    for size in sizes:
        result = result * size
    return result


def _regroup(kinds: Layout, sizes: Any, out_sizes: Any, batch: Any, length: Any) -> list[Axis]:
    """Layout of one matched run of axes."""
    if all(kind is OTHER for kind in kinds):
        return [OTHER] * len(out_sizes)
    if len(kinds) == len(out_sizes) == 1:
        return [kinds[0]]
    tokens = 2 if kinds[:2] == (BATCH, SEQ) else 1 if kinds[0] in (TOKENS, FLAT) else 0
    if tokens and all(kind is OTHER for kind in kinds[tokens:]):
        # Features behind all of the tokens, in whatever groups: each token keeps its own.
        for start in ((BATCH, SEQ), (TOKENS,)):
            of_tokens = {BATCH: batch, SEQ: length, TOKENS: batch * length}
            if len(out_sizes) > len(start) and _starts_with(out_sizes, *map(of_tokens.__getitem__, start)):
                return [*start, *[OTHER] * (len(out_sizes) - len(start))]
        features, kept = _product(sizes[tokens:]), _product(out_sizes[1:])
        if (kinds[0] is FLAT and len(out_sizes) == 1) or (kinds[0] is not FLAT and same_size(features % kept, 0)):
            return [FLAT] + [OTHER] * (len(out_sizes) - 1)
    raise NotTokenwise(f"axes {show(kinds)} of {tuple(sizes)} are regrouped as {tuple(out_sizes)}")


@register_rule(aten.transpose.int, aten.swapaxes.default, aten.swapdims.default, zero=first_is_zero)
def transpose(op: Op) -> Reading:
    x, layout, _ = _input(op)
    a, b = (op.dim(d, len(layout)) for d in op.args[1:3])
    out = list(layout)
    out[a], out[b] = out[b], out[a]
    return Reading(tuple(out), {x: layout})


@register_rule(aten.mT.default, zero=first_is_zero)
def matrix_transpose(op: Op) -> Reading:
    x, layout, _ = _input(op)
    return Reading((*layout[:-2], layout[-1], layout[-2]), {x: layout})


@register_rule(aten.permute.default, zero=first_is_zero)
def permute(op: Op) -> Reading:
    x, layout, _ = _input(op)
    return Reading(tuple(layout[d] for d in op.args[1]), {x: layout})


@register_rule(aten.movedim.int, aten.movedim.intlist, zero=first_is_zero)
def movedim(op: Op) -> Reading:
    x, layout, _ = _input(op)
    given = [dims if isinstance(dims, (list, tuple)) else [dims] for dims in op.args[1:3]]
    source, target = ([op.dim(dim, len(layout)) for dim in dims] for dims in given)
    out = [kind for axis, kind in enumerate(layout) if axis not in source]
    for to, kind in sorted((to, layout[axis]) for axis, to in zip(source, target, strict=True)):
        out.insert(to, kind)
    return Reading(tuple(out), {x: layout})


@register_rule(aten.unsqueeze.default, zero=first_is_zero)
def unsqueeze(op: Op) -> Reading:
    x, layout, _ = _input(op)
    dim = op.dim(op.args[1], len(layout) + 1)
    return Reading((*layout[:dim], OTHER, *layout[dim:]), {x: layout})


@register_rule(aten.expand.default, aten.broadcast_to.default, zero=first_is_zero)
def expand(op: Op) -> Reading:
    x, layout, shape = _input(op)
    out_shape, sizes = value_of(op.node).shape, op.args[1]
    new = len(out_shape) - len(shape)
    out = (OTHER,) * new + layout
    for axis, kind in enumerate(out):
        if kind is not OTHER and not same_size(out_shape[axis], shape[axis - new]):
            raise NotTokenwise(f"expands its {kind.value} axis")
    written = op.with_args(size=[_size(kind, size) for kind, size in zip(out, sizes, strict=True)])
    return Reading(out, {x: layout}, written)


@register_rule(aten.expand_as.default, zero=first_is_zero)
def expand_as(op: Op) -> Reading:
    x, other = op.args[:2]
    layout = op.layout(x)
    if layout is None or op.layout(other) != layout:
        raise NotTokenwise(f"expands {show(layout)} as {show(op.layout(other))}")
    return Reading(layout, {x: layout, other: layout})


@register_rule(aten.slice.Tensor, zero=first_is_zero)
def slice_(op: Op) -> Reading:
    x, layout, shape = _input(op)
    dim = op.dim(op.args[1], len(layout))
    if layout[dim] is OTHER:
        return Reading(layout, {x: layout})
    if same_size(value_of(op.node).shape[dim], shape[dim]):
        return Reading(layout, {x: layout}, Call(aten.alias.default, (x,), {}))
    raise NotTokenwise(f"takes part of the {layout[dim].value} axis")


@register_rule(aten.select.int, zero=first_is_zero)
def select(op: Op) -> Reading:
    x, layout, _ = _input(op)
    dim = op.dim(op.args[1], len(layout))
    op.refuse_token_axes([dim], layout)
    return Reading(layout[:dim] + layout[dim + 1 :], {x: layout})


@register_rule(
    aten.chunk.default,
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.tensor_split.sections,
    zero=first_is_zero,
)
def split(op: Op) -> Reading:
    x, layout, _ = _input(op)
    op.refuse_token_axes([op.dim(op.argument("dim"), len(layout))], layout)
    return Reading([layout] * len(value_of(op.node)), {x: layout})


@register_rule(aten.unbind.int, zero=first_is_zero)
def unbind(op: Op) -> Reading:
    x, layout, _ = _input(op)
    dim = op.dim(op.args[1], len(layout))
    op.refuse_token_axes([dim], layout)
    return Reading([layout[:dim] + layout[dim + 1 :]] * len(value_of(op.node)), {x: layout})


@register_rule(aten.view_as_complex.default, zero=first_is_zero)
def view_as_complex(op: Op) -> Reading:
    """(..., 2) -> (...), as rotary embeddings do with pairs of features."""
    x, layout, _ = _input(op)
    op.refuse_token_axes([len(layout) - 1], layout)
    return Reading(layout[:-1], {x: layout})


@register_rule(aten.view_as_real.default, zero=first_is_zero)
def view_as_real(op: Op) -> Reading:
    x, layout, _ = _input(op)
    return Reading((*layout, OTHER), {x: layout})


def _parts_are_zero(args: tuple[Any, ...], is_zero: Callable[[Any], bool]) -> bool:
    return all(map(is_zero, args[0]))


@register_rule(
    aten.cat.default, aten.concat.default, aten.concatenate.default, aten.stack.default, zero=_parts_are_zero
)
def cat(op: Op) -> Reading:
    """Along features; every part must have the same token axes. An empty part, as of a new cache, is none."""
    given, dim = op.args[0], op.args[1]
    parts = [part for part in given if not any(same_size(size, 0) for size in value_of(part).shape)]
    if len({value_of(part).dtype for part in given}) > 1 and len(parts) < len(given):
        raise NotTokenwise("joins an empty part of another dtype, which counts in the result's")
    layouts = {op.layout(part) for part in parts}
    (layout,) = layouts if len(layouts) == 1 else (None,)
    if layout is None or not covers_tokens(layout):
        raise NotTokenwise("joins values of different layouts: " + ", ".join(show(op.layout(p)) for p in parts))
    needs = dict.fromkeys(parts, layout)
    if len(parts) == 1 and len(given) > 1 and op.target is not aten.stack.default:
        return Reading(layout, needs, Call(aten.alias.default, (parts[0],), {}))
    if op.target is not aten.stack.default:
        op.refuse_token_axes([op.dim(dim, len(layout))], layout)
        return Reading(layout, needs, op.with_args(tensors=parts))
    at = op.dim(dim, len(layout) + 1)
    return Reading((*layout[:at], OTHER, *layout[at:]), needs)
