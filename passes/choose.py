"""Which values are computed padded, which packed, and which in both forms.

Every value has its padded form: the graph as it was. One with a packed form is computed packed whenever that is what
its users can read. Inputs are padded and are gathered where a packed op first meets them; an op without a rule reads
padded operands. What depends on a mixer exists packed only (computing it padded as well would undo the whole point,
unless the mixer is a mere shift), so an op without a rule may read it only where that is exact: scattered back, because
it is zero at padding anyway. An op that runs padded on purpose reads what is scattered back, and nothing but its packed
form is read of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import fx

from packc.passes.asks import HidesKeys, HidesPadding, ZeroAtPadding
from packc.passes.axes import covers_tokens, is_made_of_integers
from packc.passes.chosen_keys import choosers
from packc.passes.graph import Graph, Tokens, is_item
from packc.passes.heads import follow_heads
from packc.passes.module_names import module_path
from packc.passes.outlined import is_random
from packc.passes.reading import Reading
from packc.passes.reasons import NotPackable
from packc.passes.row_wise import writes_elsewhere
from packc.passes.rules.row_ends import end_taken
from packc.passes.shifted import is_shift

_BY_STRIDES = {torch.ops.aten.as_strided.default, torch.ops.aten.as_strided_scatter.default}


@dataclass
class Forms:
    """The forms in which each node is wanted."""

    packed: set[fx.Node] = field(default_factory=set)
    padded: set[fx.Node] = field(default_factory=set)
    packed_only: set[fx.Node] = field(default_factory=set)
    live: list[fx.Node] = field(default_factory=list)
    """Places that must not be left out of the pack: nodes ``(B * L,)``, nonzero there."""
    apart: set[fx.Node] = field(default_factory=set)
    """What heads make of tokens, each entry of one of them."""
    picked: dict[fx.Node, int | None] = field(default_factory=dict)
    """What is of one token a row; a number: of several, on so many axes."""
    returned: set[fx.Node] = field(default_factory=set)
    """Outputs of a part of the positions, zero at padding."""


def choose(graph: Graph) -> Graph:
    """Decide, from the outputs backwards, which form of each value is computed.

    Needs the zeros of :func:`packc.passes.zeros.zeros`.

    Raises:
        NotPackable: an op without a packed form reads, across tokens, values whose padding would differ; or nothing
            works on tokens.
    """
    forms = Forms()
    _refuse_memory(graph.gm)
    _find_packed_only(graph, forms)
    _check_boundaries(graph, forms)
    _demand(graph, forms)
    twice = [n for n in forms.packed & forms.padded if not reads_as_is(n, graph.tokens)]
    random_twice = list(filter(is_random, twice))
    if random_twice:
        raise NotPackable(f"{random_twice[0].name} draws random numbers and is read both padded and packed")
    if forms.packed.isdisjoint(graph.tokens.readings):
        refusals = [f"{node.target}: {reason}" for node, reason in graph.tokens.refusals.items()]
        raise NotPackable("; ".join(["nothing in the graph works on tokens", *refusals[:3]]))
    return replace(graph, forms=forms)


def _refuse_memory(gm: fx.GraphModule) -> None:
    for node in gm.graph.nodes:
        if writes_elsewhere(node):
            raise NotPackable(_describe(node, "writes in place, which a value with two forms cannot follow"))
        if node.target in _BY_STRIDES and node.args[0].op != "placeholder":
            raise NotPackable(_describe(node, "reads memory by strides, which may be others in a packed graph"))


def _find_packed_only(graph: Graph, forms: Forms) -> None:
    for node in graph.gm.graph.nodes:
        reading = graph.tokens.readings.get(node)
        sources = reading.operands if reading is not None else node.args[:1] if is_item(node) else ()
        along_tokens = reading is not None and (reading.is_mixer or reading.padded is not None) and not is_shift(node)
        if along_tokens or any(source in forms.packed_only for source in sources):
            forms.packed_only.add(node)


def reads_as_is(node: fx.Node, tokens: Tokens) -> bool:
    """A result without token axes (a loss, a final state): one value, whichever form computed it."""
    return not covers_tokens(tokens.layout(node)) and not isinstance(tokens.kinds.get(node), list)


def _check_boundaries(graph: Graph, forms: Forms) -> None:
    for node, ask in graph.asks(ZeroAtPadding):
        if graph.padding and ask.value not in graph.zero:
            raise NotPackable(_describe(node, f"sums {ask.value.name} over tokens, which is not masked at padding"))
    for node, hides in graph.asks(HidesPadding):
        if graph.padding and hides.mask not in graph.seen:
            raise NotPackable(_describe(node, f"{hides.mask.name} is not seen to hide padding from tokens"))
    for node, keys in graph.asks(HidesKeys):
        if graph.padding and keys.mask not in graph.hides_keys:
            raise NotPackable(_describe(node, f"{keys.mask.name} is not seen to hide padding from another sequence"))
    choosing = choosers(graph, forms.packed_only)
    forms.packed_only -= choosing
    heads = follow_heads(graph, forms.packed_only, choosing)
    forms.live, forms.apart, forms.picked = heads.live, {*heads.places, *heads.masked}, heads.picked
    forms.returned = heads.returned


def _describe(node: fx.Node, reason: str) -> str:
    return f"{node.target} in {module_path(node) or 'the model'}: {reason}"


def _demand(graph: Graph, forms: Forms) -> None:
    for node in reversed(graph.gm.graph.nodes):
        if node.op == "output":
            for value in node.all_input_nodes:
                _want_as_output(value, graph.tokens, forms)
        elif node.op == "placeholder" or (node.op == "call_function" and node.is_impure(impure_random=False)):
            forms.padded.add(node)
        if node in forms.padded:
            _demand_padded(node, graph.tokens, forms)
        if node in forms.packed:
            _demand_packed(node, graph.tokens, forms)


def _want_as_output(value: fx.Node, tokens: Tokens, forms: Forms) -> None:
    if value not in forms.packed_only and is_made_of_integers(value):
        # A mask or ids: as cheap in stock's own form, which what comes after a graph break may read at padding too.
        forms.padded.add(value)
        return
    has_packed = value in tokens.readings or (is_item(value) and not reads_as_is(value, tokens))
    (forms.packed if has_packed else forms.padded).add(value)


def _demand_padded(node: fx.Node, tokens: Tokens, forms: Forms) -> None:
    if node in forms.packed_only or (node in tokens.readings and reads_as_is(node, tokens)):
        forms.packed.add(node)
        return
    if node.target is torch.ops.aten.sym_size.int and node.args[0] in forms.packed_only:
        # Only its size is asked for, which the packed form knows without the value.
        return
    if node.args[:1] and node.args[0] in forms.packed_only and end_taken(node, tokens.layout):
        # A few positions of every row, which need no padded value of all.
        forms.packed.add(node.args[0])  # type: ignore[arg-type]
        return
    forms.padded.update(node.all_input_nodes)


def _demand_packed(node: fx.Node, tokens: Tokens, forms: Forms) -> None:
    if is_item(node):
        forms.packed.add(node.args[0])  # type: ignore[arg-type]
        return
    reading = tokens.readings[node]
    for operand in arguments_of(node, reading):
        follows = operand in reading.operands and is_computed_packed(operand, tokens)
        (forms.packed if follows else forms.padded).add(operand)


def arguments_of(node: fx.Node, reading: Reading) -> list[fx.Node]:
    """What is read where a reading is written."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs) if reading.call is None else reading.call[1:], found.append)
    return found


def is_computed_packed(operand: fx.Node, tokens: Tokens) -> bool:
    """Whether the operand's packed form comes from an op; otherwise it is gathered from the padded one, as a sum or a
    state is that happens to lie along the tokens."""
    from_op = operand in tokens.readings or is_item(operand)
    return from_op and not reads_as_is(operand, tokens)
