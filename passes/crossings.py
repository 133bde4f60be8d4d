"""Whether anything goes from one document of a row to another where a mixer does not see to it.

A row may hold several documents, which a batch says (:mod:`packc.boundaries`). Mixers are told; ops that treat every
token on its own need not be. What is left are ops that have no packed form: attention that runs padded, and whatever
else looks along the rows and has no rule. Their results are followed. Labels of the next token may go into a loss, and
heads may give entries of one token each, as they keep places apart; anything else that reaches tokens or outputs may
carry something across, and then a row must be one document.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import torch
from torch import Tensor, fx

from packc.passes.asks import HidesPadding, IgnoredLabels, OneDocument
from packc.passes.axes import SEQ, Whole, is_made_of_integers, is_tensor, same_size, value_of
from packc.passes.choose import arguments_of, is_computed_packed
from packc.passes.graph import Graph
from packc.passes.module_names import module_path
from packc.passes.place_wise import is_entrywise, works_behind
from packc.passes.positions import hangs_on_length, knows_only_positions
from packc.passes.reading import Reading
from packc.passes.shifted import is_shift
from packc.passes.unpacked import is_mixer
from packc.passes.visible import Band

aten = torch.ops.aten
_RESHAPES = {aten.view.default, aten.reshape.default, aten.flatten.using_ints}


class Along(enum.Enum):
    """What an op without a packed form made along the rows."""

    PLACES = "entries of one place each"
    PICKED = "an entry of another place"
    MIXED = "entries of several"
    TOTAL = "a sum over the tokens of all rows"


def one_document(graph: Graph, *, of_positions: bool = False) -> str | None:
    """Why a row of the packed graph must be one document; None if it may hold several, wherever they begin.

    ``of_positions``: if positions that start again begin them, which attention masks may go by as well.
    """
    for node in graph.gm.graph.nodes:  # those that never meet the rows are of other rows
        if is_mixer(node) and node in graph.tokens.refusals:
            return _describe(node, graph.tokens.refusals[node])
        if is_shift(node) and node in graph.tokens.readings and node in graph.forms.padded:
            return _describe(node, "shifts whole rows, for what runs padded")
    for node, ask in graph.asks(OneDocument):
        if node in graph.forms.packed:
            return _describe(node, ask.reason)
    for node, reading in graph.tokens.readings.items():
        leaks = reading.padded is not None and not (of_positions and _mask_keeps_apart(graph, reading))
        if node in graph.forms.packed and leaks:
            return _describe(node, f"{reading.padded}")
    return _counted_otherwise(graph) or _carried_across(graph)


def _counted_otherwise(graph: Graph) -> str | None:
    """Positions that the model counts by itself start again with each document, unless they count from elsewhere."""
    for node, reading in graph.tokens.readings.items():
        for value in arguments_of(node, reading) if node in graph.forms.packed else ():
            along = reading.operands.get(value, ())
            if SEQ not in along or is_computed_packed(value, graph.tokens) or not knows_only_positions(value):
                continue
            by = hangs_on_length(value, graph.sizes[1])
            if by is not None:
                return _describe(node, f"reads {value.name}, by {by.target} of as many positions as a row has")
    return None


def _mask_keeps_apart(graph: Graph, reading: Reading) -> bool:
    masks = [graph.seen.get(ask.mask) for ask in reading.asks if isinstance(ask, HidesPadding)]
    return bool(masks) and all(isinstance(seen, Band) and seen.apart for seen in masks)


def moved(graph: Graph, value: fx.Node) -> bool:
    """Whether an op without a packed form made a value along the rows, as labels are shifted."""
    return value in _made_along(graph)


def _carried_across(graph: Graph) -> str | None:
    along = _made_along(graph)
    for node, reading in graph.tokens.readings.items():
        if node not in graph.forms.packed:
            continue
        may = [ask.labels for ask in reading.asks if isinstance(ask, IgnoredLabels)]
        may += [ask.mask for ask in reading.asks if isinstance(ask, HidesPadding)]  # judged by what it shows
        if node.target is aten.gather.default and not any(user in graph.tokens.readings for user in node.users):
            may += filter(is_made_of_integers, node.all_input_nodes)  # a head's: of the next tokens' logits
        for value in arguments_of(node, reading):
            if value in along and value not in may and reading.results is not Whole.SUM:
                return _describe(node, f"reads {value.name}, {along[value].value} along the rows")
    for value in graph.gm.graph.output_node().all_input_nodes:
        if along.get(value) is Along.MIXED and not is_made_of_integers(value):
            return f"the output {value.name} has {Along.MIXED.value} along the rows"
    return None


def _made_along(graph: Graph) -> dict[fx.Node, Along]:
    """Values made along the rows by ops without a packed form, and what is made of them."""
    tokens, forms = graph.tokens, graph.forms
    found: dict[fx.Node, Along] = {}
    picks: dict[fx.Node, _Pick] = {}
    for node in graph.gm.graph.nodes:
        if node.op != "call_function" or not isinstance(value_of(node), (Tensor, list, tuple)):
            continue
        of = {found[each] for each in node.all_input_nodes if each in found}
        if node in forms.picked:
            found[node], picks[node] = Along.PICKED, _Pick(node, forms.picked[node])
        elif node in tokens.readings:
            if tokens.readings[node].results is Whole.SUM:
                found[node] = Along.TOTAL
        elif node in forms.apart:
            found[node] = Along.PLACES
        elif node in tokens.refusals or of - {Along.TOTAL, Along.PICKED}:
            found[node] = Along.MIXED
        elif Along.PICKED in of and is_tensor(node) and value_of(node).ndim:
            pick = _made_of_picks(node, picks)
            found[node] = Along.MIXED if pick is None else Along.PICKED
            picks |= {} if pick is None else {node: pick}
        elif of:
            found[node] = Along.TOTAL
    return found


class _Pick(NamedTuple):
    """What is made of picked entries."""

    node: fx.Node
    """That picks them."""
    rank: int | None
    """On how many axes they are several of a row; None: it is one."""


def _made_of_picks(node: fx.Node, picks: dict[fx.Node, _Pick]) -> _Pick | None:
    """What an op makes of picked entries, if each of its own is made of those of one place."""
    of = {picks[each] for each in node.all_input_nodes if each in picks}
    pick = of.pop()
    if of:
        return None
    rank = pick.rank
    if rank is None or is_entrywise(node) or works_behind(node, rank) or node.target is aten.linear.default:
        return pick
    if node.target in _RESHAPES:
        features, sizes = value_of(node.args[0]).shape[rank:], value_of(node).shape
        kept = len(sizes) - len(features)
        if kept > 0 and all(map(same_size, sizes[kept:], features)):
            return pick._replace(rank=kept)
    return None


def _describe(node: fx.Node, reason: str) -> str:
    return f"{node.target} in {module_path(node) or 'the model'}: {reason}"
