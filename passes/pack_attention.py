"""Packed attention in the place of padded, where its mask says no more than ``varlen_attention`` can be told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from packc.passes.arguments import argument
from packc.passes.asks import HidesKeys, HidesPadding
from packc.passes.attention_as_written import AsWritten
from packc.passes.graph import Graph
from packc.passes.reading import Call, NotTokenwise
from packc.passes.rules.attention import packed_as_written, varlen_attention
from packc.passes.rules.registry import Op
from packc.passes.visible import Band

aten = torch.ops.aten


def pack_attention(graph: Graph) -> Graph:
    """Read attention as a mixer.

    Where a batch keeps padding that its mask hides, what it gives is not stock's: such a batch goes through the graph
    that is written without this pass.
    """
    tokens = replace(graph.tokens, readings=dict(graph.tokens.readings))
    for node, reading in graph.tokens.readings.items():
        as_written = isinstance(node.target, AsWritten)
        if not as_written and node.target is not aten.scaled_dot_product_attention.default:
            continue
        masks = [ask.mask for ask in reading.asks if isinstance(ask, (HidesPadding, HidesKeys))]
        seen = {**graph.seen, **graph.hides_keys}.get(masks[0]) if masks else Band(argument(node, "is_causal"))
        if reading.padded is None or seen is None:
            continue
        try:
            op = Op(node, tokens, *graph.sizes)
            if as_written:
                tokens.readings[node] = packed_as_written(op, seen, reading, graph.biased)
            else:
                shown = graph.biased.get(masks[0], seen) if masks else seen
                tokens.readings[node] = varlen_attention(op, shown, reading)
        except NotTokenwise as reason:
            tokens.readings[node] = replace(reading, padded=str(reason))
    return replace(graph, tokens=tokens)


def packed_attention(graph: Graph) -> Iterator[tuple[fx.Node, Call]]:
    """The attention that is computed packed, and the call of packc's op in the reading of each."""
    for node, reading in graph.tokens.readings.items():
        if node in graph.forms.packed:
            yield from ((node, call) for call in _attention(reading.call))


def _attention(call: Any) -> Iterator[Call]:
    if isinstance(call, Call):
        if call.is_mixer and "causal" in call.arguments:
            yield call
        for each in call.args:
            yield from _attention(each)
