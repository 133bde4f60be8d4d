"""Attention: over padded rows, exact where its mask hides padding, or packed, where the mask is of a known form."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import fx

from packc.ops.varlen_attention.dropout import SEEDS
from packc.passes.asks import Ask, HidesKeys, HidesPadding, KeepLeft, OneDocument
from packc.passes.axes import BATCH, OTHER, SEQ, Layout, Whole, covers_tokens, same_size, show, value_of
from packc.passes.graph import Graph
from packc.passes.reading import Call, InChunks, NotTokenwise, Reading
from packc.passes.repeated_heads import before_repeats
from packc.passes.rules.registry import Op, broadcast_layout, register_rule
from packc.passes.varlen_form import varlen_form
from packc.passes.visible import Band, Biased, Chunks, Seen

aten = torch.ops.aten
_HEADS_FIRST = (BATCH, OTHER, SEQ, OTHER)
_TOKENS_FIRST = (BATCH, SEQ, OTHER, OTHER)
_ACROSS = "attends from one sequence to another: runs padded"
_OTHER_MASK = "shows neither all tokens, nor those before, nor a window: runs padded"
_MORE = "caps scores, adds biases to them, or has sinks: runs padded"
_BY_ROWS = OneDocument("attends from one sequence to another, row by row")


@register_rule(aten.scaled_dot_product_attention.default)
def scaled_dot_product_attention(op: Op) -> Reading:
    """q, k, v (B, heads, L, channels), of one sequence; the mask (B or 1, heads or 1, L, L), or causal without one."""
    q, k, v, mask = op.args[:4]
    layouts = [op.layout(each) for each in (q, k, v)]
    if (reading := _across_sequences(op) or _within_tokens(op)) is not None:
        return reading
    if any(layout != _HEADS_FIRST for layout in layouts):
        raise NotTokenwise(f"attends with {', '.join(map(show, layouts))} where (B, ., L, .) is one sequence's")
    reading = Reading(_HEADS_FIRST, dict.fromkeys((q, k, v), _HEADS_FIRST), padded="is not packed")
    if mask is not None:
        reading.asks.append(HidesPadding(mask))
    elif op.argument("is_causal"):
        reading.asks.append(KeepLeft("attention without a mask reads left padding"))
    elif op.padding:
        raise NotTokenwise("attends to padding: it has no mask, and is not causal")
    return reading


def _across_sequences(op: Op) -> Reading | None:
    """Attention to another sequence, for the sequence of the queries and for that of the keys; None for any other."""
    q, k, v, mask = op.args[:4]
    of_queries, of_keys, of_values = (op.layout(each) for each in (q, k, v))
    if of_queries == _HEADS_FIRST and of_keys is None and of_values is None:
        # A query's result is made of no other query, and keys are as they are.
        return Reading(_HEADS_FIRST, {q: _HEADS_FIRST}, padded=_ACROSS)
    if of_queries is None and of_keys == of_values == _HEADS_FIRST:
        if mask is None and op.padding:
            raise NotTokenwise("attends to padding of another sequence: it has no mask")
        if op.argument("is_causal"):
            raise NotTokenwise("is causal from one sequence to another")
        asks: list[Ask] = [] if mask is None else [HidesKeys(mask)]
        return Reading(Whole.OF_OTHERS, {k: _HEADS_FIRST, v: _HEADS_FIRST}, padded=_ACROSS, asks=asks)
    return None


def _within_tokens(op: Op) -> Reading | None:
    """Attention of each token to what it has several of itself, ``(B, L, ., channels)``, on tokens two products and a
    softmax: fused kernels are for long rows, and few. None for any other."""
    q, k, v, mask, dropout = op.args[:5]
    layouts = [op.layout(each) for each in (q, k, v)]
    if not any(map(covers_tokens, layouts)) or any(each and each[-2:] != (OTHER, OTHER) for each in layouts):
        return None
    if mask is not None or op.argument("is_causal") or op.argument("enable_gqa"):
        raise NotTokenwise("attends within tokens, by a mask or in groups of heads")
    layout, needs = broadcast_layout(op, [q, k, v], value_of(op.node).shape)
    dtype = value_of(op.node).dtype
    scale = value_of(q).shape[-1] ** -0.5 if op.argument("scale") is None else op.argument("scale")
    q, k, v = (_cast(each, dtype) for each in (q, k, v))
    scores = Call(aten.matmul.default, (q, Call(aten.transpose.int, (k, -2, -1), {})), {})
    exact = dtype if dtype == torch.float64 else torch.float32
    shares = _cast(Call(aten.softmax.int, (Call(aten.mul.Tensor, (scores, scale), {}), -1, exact), {}), dtype)
    if dropout:
        shares = Call(aten.dropout.default, (shares, dropout, True), {})
    return Reading(layout, needs, Call(aten.matmul.default, (shares, v), {}))


def as_written(op: Op) -> Reading:
    """Of :class:`packc.passes.attention_as_written.AsWritten`."""
    q, transposed, v, mask, *others = op.args
    layouts: dict[fx.Node, Layout] = {q: _HEADS_FIRST, transposed: (BATCH, OTHER, OTHER, SEQ), v: _HEADS_FIRST}
    for each, wanted in layouts.items():
        if op.layout(each) != wanted:
            raise NotTokenwise(
                f"attends with {each.name} {show(op.layout(each))} where {show(wanted)} is one sequence's"
            )
    for each in others:
        if op.layout(each) == _HEADS_FIRST:  # of each query, as sinks may be
            layouts[each] = _HEADS_FIRST
    op.only_labelled(*layouts, mask)
    return Reading(_HEADS_FIRST, layouts, padded=_MORE, asks=[HidesPadding(mask)])


def attends_to_others(graph: Graph) -> bool:
    """Whether tokens of the mask's sequence are queries to another one."""
    readings = graph.tokens.readings.values()
    return any(each.padded == _ACROSS and each.results is not Whole.OF_OTHERS for each in readings)


def varlen_attention(op: Op, seen: Seen | Biased, padded: Reading) -> Reading:
    """The reading of an attention that shows tokens what is ``seen``, given the one that runs it padded."""
    seen, biases = seen if isinstance(seen, Biased) else (seen, None)
    if padded.padded == _ACROSS:
        return _cross_attention(op, seen, padded)
    seen, cu_seqlens = _as_band(seen)
    _refuse_other_heads(op)
    q, k, v = op.args[:3]
    k, v = _as_they_were(op, k, v)
    dropout_p = op.argument("dropout_p")
    options = (seen.causal, op.argument("scale"), seen.window, dropout_p, _seed(op, dropout_p), None)
    operands: dict[fx.Node, Layout] = dict.fromkeys((q, k, v), _HEADS_FIRST)
    bias = _relative_bias(op, biases, operands)
    out = _attended((*_operands(value_of(op.node).dtype, q, k, v), None, bias, cu_seqlens, *options))
    return replace(padded, operands=operands, call=out, padded=None, is_mixer=True)


def _as_band(seen: Seen) -> tuple[Band, InChunks | None]:
    """What tokens see of a document, and what is one."""
    if isinstance(seen, Chunks):
        return Band(causal=True), InChunks(seen.size)
    if not isinstance(seen, Band):
        raise NotTokenwise(_OTHER_MASK)
    return seen, None


def _relative_bias(op: Op, biases: fx.Node | None, operands: dict[fx.Node, Layout]) -> object:
    """The argument of ``varlen_attention``, of one more operand."""
    if biases is None:
        return None
    places = op.layout(biases)
    heads = 1 if places == _HEADS_FIRST else 2
    value = value_of(biases)
    if places is None or value.device.type != "cpu" or not same_size(value.shape[heads], value_of(op.args[0]).shape[1]):
        raise NotTokenwise(_MORE)
    operands[biases] = places
    return biases if heads == 2 else Call(aten.transpose.int, (biases, 1, 2), {})


def packed_as_written(op: Op, seen: Seen, padded: Reading, biased: Mapping[fx.Node, Biased]) -> Reading:
    """The same of :class:`packc.passes.attention_as_written.AsWritten`, with what is known of biases."""
    form = varlen_form(op.node)
    if form is None or (form.biases is not None and form.biases not in biased):
        raise NotTokenwise(_MORE)
    seen, cu_seqlens = _as_band(seen)
    q, transposed, v = op.args[:3]
    heads = {value_of(each).shape[1] for each in (q, transposed, v)}
    if len(heads) > 1:
        raise NotTokenwise(_MORE)
    k = transposed
    layouts: dict[fx.Node, Layout] = {q: _HEADS_FIRST, transposed: (BATCH, OTHER, OTHER, SEQ), v: _HEADS_FIRST}
    if transposed.target is aten.transpose.int and op.layout(transposed.args[0]) == _HEADS_FIRST:
        k, v = _as_they_were(op, transposed.args[0], v)
        layouts = dict.fromkeys((q, k, v), _HEADS_FIRST)
    # Scores in their own dtype if that is wider than the result's.
    result = value_of(op.node).dtype
    dtype = torch.promote_types(form.dtype, result)
    keys = Call(aten.transpose.int, (k, -2, -1), {}) if k is transposed else k
    sinks = None if form.sinks is None else _sinks(op, form.sinks, layouts)
    seed = _seed(op, form.dropout_p)
    options = (seen.causal, form.scale, seen.window, form.dropout_p, seed, form.softcap)
    bias = None if form.biases is None else _relative_bias(op, biased[form.biases].biases, layouts)
    out = _attended((*_operands(dtype, q, keys, v), sinks, bias, cu_seqlens, *options))
    out = out if dtype == result else Call(aten.to.dtype, (out, result), {})
    return replace(padded, operands=layouts, call=out, padded=None, is_mixer=True)


def _sinks(op: Op, sinks: fx.Node, operands: dict[fx.Node, Layout]) -> Call:
    """The argument of ``varlen_attention``: of each head, or of each token and head, which is one more operand."""
    layout = op.layout(sinks)
    if layout == _HEADS_FIRST:
        operands[sinks] = layout
        return Call(aten.squeeze.dim, (Call(aten.transpose.int, (sinks, 1, 2), {}), 3), {})
    if layout is not None or any(not same_size(value_of(sinks).shape[axis], 1) for axis in (0, 2, 3)):
        raise NotTokenwise(_MORE)
    return Call(aten.reshape.default, (sinks, [-1]), {})


def _attended(arguments: tuple[object, ...]) -> Call:
    """``(B, heads, L, channels)``"""
    attend = Call(torch.ops.packc.varlen_attention.default, arguments, {})
    return Call(aten.transpose.int, (Call(operator.getitem, (attend, 0), {}), 1, 2), {})


def _as_they_were(op: Op, k: fx.Node, v: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Keys and values before their heads were repeated, if both were, and as often."""
    before = before_repeats(k), before_repeats(v)
    if None in before or any(op.layout(each) != _HEADS_FIRST for each in before):
        return k, v
    heads = {value_of(each).shape[1] for each in before}
    return before if len(heads) == 1 else (k, v)  # type: ignore[return-value]


def _cross_attention(op: Op, seen: Seen, padded: Reading) -> Reading:
    """To the keys' documents, of queries in rows; these follow when their sequence is packed."""
    if padded.results is not Whole.OF_OTHERS:
        raise NotTokenwise(_ACROSS)
    if not isinstance(seen, Band):
        raise NotTokenwise(
            "attends to another sequence by a mask that hides more than its padding, or adds to scores: runs padded"
        )
    result = value_of(op.node)
    if result.device.type != "cpu" and result.dtype not in (torch.bfloat16, torch.float16):
        raise NotTokenwise(f"attends to another sequence in {result.dtype} on {result.device.type}: runs padded")
    rows, of_keys = (value_of(each).shape[0] for each in op.args[:2])
    if not same_size(rows, of_keys):
        raise NotTokenwise(f"{rows} rows of queries meet {of_keys} of keys: runs padded")
    _refuse_other_heads(op)
    dropout_p = op.argument("dropout_p")
    options = op.argument("scale"), dropout_p, _seed(op, dropout_p)
    operands = _operands(value_of(op.node).dtype, *op.args[:3])
    attend = Call(torch.ops.packc.cross_attention.default, (*operands, None, None, *options), {})
    out = Call(aten.transpose.int, (attend, 1, 2), {})
    return replace(padded, call=out, padded=None, is_mixer=True, asks=[*padded.asks, _BY_ROWS])


@register_rule(torch.ops.packc.cross_attention.default)
def cross_attention(op: Op) -> Reading:
    """q (B, L, heads, channels), in rows; keys are packed."""
    q, cu_seqlens = op.args[0], op.argument("cu_seqlens")
    op.only_labelled(q)
    if cu_seqlens is not None or op.layout(q) != _TOKENS_FIRST:
        raise NotTokenwise(f"attends from {show(op.layout(q))} where (B, L, ., .) is a row's queries")
    return Reading(_TOKENS_FIRST, {q: _TOKENS_FIRST}, op.with_args(), is_mixer=True, asks=[_BY_ROWS])


def _seed(op: Op, dropout_p: float) -> Call | None:
    """Drawn by an op that everybody knows to draw: what is computed again for a checkpoint gets the same seed."""
    if dropout_p == 0:
        return None
    if value_of(op.node).device.type != "cpu":
        raise NotTokenwise(f"attention with dropout runs padded on {value_of(op.node).device.type}")
    return Call(aten.randint.default, (SEEDS, []), {"dtype": torch.int64, "device": torch.device("cpu")})


def _refuse_other_heads(op: Op) -> None:
    heads, of_keys, of_values = (value_of(each).shape[1] for each in op.args[:3])
    shared = same_size(of_keys, 1) or same_size(heads, of_keys) or op.argument("enable_gqa")
    if not same_size(of_keys, of_values) or not shared:
        raise NotTokenwise(f"{heads} heads of queries meet {of_keys} of keys and {of_values} of values: runs padded")


def _operands(dtype: torch.dtype, *given: object) -> list[Call]:
    """In the result's dtype: under autocast it is not that of q."""
    return [_tokens_first(each, dtype) for each in given]


def _tokens_first(operand: object, dtype: torch.dtype) -> Call:
    """(B, heads, L, channels) -> (B, L, heads, channels)."""
    return Call(aten.transpose.int, (_cast(operand, dtype), 1, 2), {})


def _cast(operand: object, dtype: torch.dtype) -> object:
    if isinstance(operand, fx.Node) and value_of(operand).dtype == dtype:
        return operand
    return Call(aten.to.dtype, (operand, dtype), {})
