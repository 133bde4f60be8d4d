"""Which inputs belong to a mask's sequence: those whose values meet values of that sequence in an op.

Two inputs of one size may be two sequences, chosen and rejected answers or queries and documents, each with its own
tokens. Equal sizes are therefore only where the search begins: every input of the mask's (B, L) is followed as if it
were a sequence of its own, and two of them become one when an op reads both, token by token (a mask multiplied on,
labels against logits). What never meets the mask is another sequence, or none, and stays padded.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from packc.passes.asks import HidesPadding, KeepLeft
from packc.passes.attention_as_written import AsWritten
from packc.passes.axes import inputs_of, is_tensor, same_size, value_of
from packc.passes.graph import Graph, Tokens, is_item
from packc.passes.module_names import module_path
from packc.passes.reasons import NotPackable
from packc.passes.sources import argument_path
from packc.passes.zeros import is_masked, zero_at_padding, zero_at_tokens


def sequence_of(graph: Graph, inputs: Iterable[fx.Node], tokens: Tokens) -> set[fx.Node]:
    """The inputs of the sequence of the graph's mask, the mask among them.

    Args:
        graph: a graph with a mask.
        inputs: the inputs of its size.
        tokens: what becomes of their axes if every one of them is taken for tokens.

    Raises:
        NotPackable: two sequences, in each of which a mixer has looked along its own tokens, meet in an op. They may
            have different tokens, and one pack cannot hold both.
    """
    sequences = _Sequences(inputs)
    reached: dict[fx.Node, fx.Node] = {node: node for node in inputs}  # value -> one of the inputs it was made from
    for node in graph.gm.graph.nodes:
        reading = tokens.readings.get(node)
        read = reading.operands if reading is not None else node.args[:1] if is_item(node) else ()
        met = [reached[operand] for operand in read if operand in reached]
        if reading is not None:
            masks = [ask.mask for ask in reading.asks if isinstance(ask, HidesPadding)]
            hiding = [each for mask in masks for each in inputs_of(mask) if each in reached]
            if (queries := _across(node, read, reached, sequences)) is not None:
                reached[node] = queries
                of_keys = [each for each in hiding if sequences.are_apart(each, queries)]
                sequences.meet(node, [reached[node.args[1]], *of_keys], is_mixer=True)
                continue
            met += hiding if met else []
        if met:
            reached[node] = met[0]
            sequences.meet(node, met, is_mixer=reading is not None and (reading.is_mixer or reading.padded is not None))
    return sequences.containing(graph.mask)


def _across(
    node: fx.Node, read: Iterable[fx.Node], reached: dict[fx.Node, fx.Node], sequences: _Sequences
) -> fx.Node | None:
    """Of attention from one sequence to another, an input of the queries': they do not meet, whatever their sizes."""
    attends = node.target is torch.ops.aten.scaled_dot_product_attention.default or isinstance(node.target, AsWritten)
    if not attends or not set(node.args[:3]) <= set(read):
        return None
    query, key = (reached.get(each) for each in node.args[:2])  # type: ignore[arg-type]
    apart = query is not None and key is not None and sequences.are_apart(query, key)
    return query if apart else None


class _Sequences:
    """Inputs joined by the ops in which they meet."""

    def __init__(self, inputs: Iterable[fx.Node]) -> None:
        self.members = {node: {node} for node in inputs}
        self.mixed: set[int] = set()
        self.clashes: dict[int, str] = {}

    def meet(self, node: fx.Node, inputs: list[fx.Node], *, is_mixer: bool) -> None:
        sets = list({id(self.members[each]): self.members[each] for each in inputs}.values())
        joined = set().union(*sets)
        already = [each for each in sets if id(each) in self.mixed]
        clash = next((self.clashes[id(each)] for each in sets if id(each) in self.clashes), None)
        if len(already) > 1:
            names = " and ".join("/".join(sorted(map(argument_path, each))) for each in already)
            clash = clash or f"{node.target} in {module_path(node) or 'the model'}: two sequences meet, {names}"
        if len(sets) > 1:
            for each in joined:
                self.members[each] = joined
        else:
            joined = sets[0]
        if already or is_mixer:
            self.mixed.add(id(joined))
        if clash is not None:
            self.clashes[id(joined)] = clash

    def are_apart(self, a: fx.Node, b: fx.Node) -> bool:
        """Whether two inputs have not met, position by position, so that nobody says that they have the same tokens."""
        return self.members[a] is not self.members[b]

    def containing(self, mask: fx.Node) -> set[fx.Node]:
        found = self.members[mask]
        if id(found) in self.clashes:
            raise NotPackable(self.clashes[id(found)])
        return found


def other_masks(graph: Graph) -> list[fx.Node]:
    """Further masks of the mask's sequence: inputs that set to zero what a mixer or the caller reads, where the mask
    does not. Packing by one mask is exact as long as no other marks tokens outside of it.

    Needs the zeros of :func:`packc.passes.zeros.zeros`.

    Raises:
        NotPackable: one marks padding, not tokens; or is made in the graph, and no batch can be asked about it.
    """
    found, known, own_name = [], set(graph.zero), argument_path(graph.mask)
    by_mixers = read_by_mixers(graph)
    read = by_mixers + [each for each in graph.gm.graph.output_node().all_input_nodes if is_tensor(each)]
    for node in graph.placeholders:
        if node is graph.mask or node not in graph.tokens.kinds or not _is_per_token(value_of(node)):
            continue
        opposite = zero_at_tokens(graph, node) - graph.zero
        if any(value in opposite for value in read):
            raise NotPackable(
                f"{argument_path(node)} sets to zero what it marks, so tokens are not those of {own_name}"
            )
        own = zero_at_padding(graph, node) - graph.zero
        if not _made_of_hidden(graph, own).isdisjoint(read):
            found.append(node)
            known |= own
    for value in by_mixers:
        if value not in known and (by := is_masked(value)) is not None and inputs_of(by) != {graph.mask}:
            raise NotPackable(f"{by.name} is a mask of its own, which {own_name} knows nothing of")
    return found


def _made_of_hidden(graph: Graph, zero: set[fx.Node]) -> set[fx.Node]:
    """What is made, token by token, of values that a mask sets to zero; and those themselves.

    ``zero`` are all that are zero where the mask is. One that is only made from it, as angles are from positions, hides
    nothing; and what the graph's own mask sets to zero later on loses nothing.
    """
    found = {value for value in zero if any(_is_hidden(graph, each, zero) for each in value.all_input_nodes)}
    for node in graph.gm.graph.nodes:
        reading = graph.tokens.readings.get(node)
        read = reading.operands if reading is not None else node.args[:1] if is_item(node) else ()
        if node not in graph.zero and graph.tokens.has_axes(node) and not found.isdisjoint(read):
            found.add(node)
    return found | zero


def _is_hidden(graph: Graph, operand: fx.Node, zero: set[fx.Node]) -> bool:
    """Whether an operand of what is zero is a value of tokens, and not zero itself."""
    floats = is_tensor(operand) and value_of(operand).is_floating_point()
    return floats and operand not in zero and graph.tokens.has_axes(operand)


def read_by_mixers(graph: Graph) -> list[fx.Node]:
    """What mixers read across tokens, which models mask at padding."""
    return [value for _, ask in graph.asks(KeepLeft) for value in ask.unless_zero]


def _is_per_token(value: torch.Tensor) -> bool:
    """``(B, L)``, or ``(B, L, 1)`` as masks are multiplied on."""
    return all(same_size(size, 1) for size in value.shape[2:])
