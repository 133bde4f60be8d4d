"""Which inputs belong to a mask's sequence: those whose values meet values of that sequence in an op.

Two inputs of one size may be two sequences, chosen and rejected answers or queries and documents, each with its own
tokens. Equal sizes are therefore only where the search begins: every input of the mask's (B, L) is followed as if it
were a sequence of its own, and two of them become one when an op reads both, token by token (a mask multiplied on,
labels against logits). What never meets the mask is another sequence, or none, and stays padded.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import fx

from packc.passes.axes import inputs_of, same_size
from packc.passes.module_names import module_path
from packc.passes.padding import is_masked, zero_at_padding, zero_at_tokens
from packc.passes.reasons import NotPackable
from packc.passes.rules import PackedForm
from packc.passes.sources import argument_path

if TYPE_CHECKING:
    from packc.passes.layout import Propagated


def sequence_of(mask: fx.Node, inputs: Iterable[fx.Node], followed: Propagated, gm: fx.GraphModule) -> set[fx.Node]:
    """The inputs of the mask's sequence, the mask among them.

    Args:
        mask: the padding mask.
        inputs: the inputs of its size.
        followed: what becomes of their axes if every one of them is taken for tokens.

    Raises:
        NotPackable: two sequences, in each of which a mixer has looked along its own tokens, meet in an op. They may
            have different tokens, and one pack cannot hold both.
    """
    sequences = _Sequences(inputs)
    reached: dict[fx.Node, fx.Node] = {node: node for node in inputs}  # value -> one of the inputs it was made from
    for node in gm.graph.nodes:
        form = followed.forms.get(node)
        read = form.operands if form is not None else node.args[:1] if node.target is operator.getitem else ()
        met = [reached[operand] for operand in read if operand in reached]
        if met:
            reached[node] = met[0]
            sequences.meet(node, met, is_mixer=form is not None and form.is_mixer)
    return sequences.containing(mask)


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

    def containing(self, mask: fx.Node) -> set[fx.Node]:
        found = self.members[mask]
        if id(found) in self.clashes:
            raise NotPackable(self.clashes[id(found)])
        return found


def other_masks(gm: fx.GraphModule, mask: fx.Node, zero: set[fx.Node]) -> list[fx.Node]:
    """Further masks of the mask's sequence: inputs that set to zero what a mixer or the caller reads, where ``mask``
    does not. Packing by one mask is exact as long as no other marks tokens outside of it.

    Needs the layouts of :func:`packc.passes.layout.layout`.

    Raises:
        NotPackable: one marks padding, not tokens; or is made in the graph, and no batch can be asked about it.
    """
    found, known = [], set(zero)
    for node in gm.graph.find_nodes(op="placeholder"):
        if node is mask or "layout" not in node.meta or not _is_per_token(node.meta["val"]):
            continue
        opposite = zero_at_tokens(gm, node) - zero
        if any(value in opposite for value in _read_values(gm)):
            raise NotPackable(
                f"{argument_path(node)} sets to zero what it marks, so tokens are not those of {argument_path(mask)}"
            )
        own = zero_at_padding(gm, node) - zero
        if any(value in own for value in _read_values(gm)):
            found.append(node)
            known |= own
    for value in _read_values(gm, mixers_only=True):
        if value not in known and (by := is_masked(value)) is not None and inputs_of(by) != {mask}:
            raise NotPackable(f"{by.name} is a mask of its own, which {argument_path(mask)} knows nothing of")
    return found


def _is_per_token(value: torch.Tensor) -> bool:
    """``(B, L)``, or ``(B, L, 1)`` as masks are multiplied on."""
    return all(same_size(size, 1) for size in value.shape[2:])


def _read_values(gm: fx.GraphModule, *, mixers_only: bool = False) -> Iterable[fx.Node]:
    for node in gm.graph.nodes:
        form: PackedForm | None = node.meta.get("packed_form")
        if form is not None and form.keep_left_unless_zero is not None:
            yield form.keep_left_unless_zero[0]
        elif node.op == "output" and not mixers_only:
            yield from (value for value in node.all_input_nodes if isinstance(value.meta.get("val"), torch.Tensor))
