"""What a head reads of the model's values, after ops that move along the sequence: ``logits[:, :-1]``, the last token.

Such an op has no packed form. It reads what the model computed scattered back, zero at padding where stock has values
of its own, and that is well as long as these stay out of the result. So every value made of them is followed, with the
place in the padded batch that each of its entries comes from: through ops that keep places apart, until a mask is
multiplied on, or one place a row is picked. Which places count is then known from the inputs, and asked of each batch:
they are *live*, and must not be left out. Whatever else reads such values needs stock's, and the graph is not packed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from packc.passes.arguments import argument
from packc.passes.asks import HidesPadding
from packc.passes.attention_as_written import biases_of
from packc.passes.axes import (
    BATCH,
    OTHER,
    SEQ,
    TOKENS,
    covers_tokens,
    inputs_of,
    is_made_of_integers,
    is_tensor,
    same_size,
    value_of,
)
from packc.passes.graph import Graph
from packc.passes.module_names import module_path
from packc.passes.place_wise import dims_of, is_entrywise, works_behind
from packc.passes.reasons import NotPackable
from packc.passes.rules import zero_rule_for
from packc.passes.rules.row_ends import is_kept_end
from packc.passes.sources import is_parameter

aten = torch.ops.aten

_OF_SIZE_ALONE = {aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.sym_size.int}
_RESHAPES = {aten.view.default, aten.reshape.default}


def follow_heads(graph: Graph, packed_only: set[fx.Node], choosers: set[fx.Node]) -> Heads:
    """Follow what is made of tokens by ops that have no packed form, but for ``choosers``, of which nothing hangs
    on padding.

    Raises:
        NotPackable: an op reads, across tokens, values whose padding would differ.
    """
    heads = Heads(graph, packed_only, choosers)
    for node in list(graph.gm.graph.nodes):
        heads.follow(node)
    return heads


class Heads:
    def __init__(self, graph: Graph, packed_only: set[fx.Node], choosers: set[fx.Node]) -> None:
        self.graph, self.packed_only, self.choosers = graph, packed_only, choosers
        self.places: dict[fx.Node, fx.Node] = {}
        """A value with entries that may not be stock's -> of each entry of its first axes, the place in the batch."""
        self.zero: set[fx.Node] = set()
        """Those of them that are zero at padding."""
        self.masked: set[fx.Node] = set()
        """What is zero where a mask is, and of one place an entry elsewhere."""
        self.picked: dict[fx.Node, int | None] = {}
        """Of one place a row; a number: of several, on so many axes."""
        self.returned: set[fx.Node] = set()
        """Outputs of places, zero at padding."""
        self.live: list[fx.Node] = []
        """Nodes ``(B * L,)`` of what is made from inputs, nonzero at places that count in what heads make of tokens."""
        self._made: dict[Any, fx.Node] = {}

    def follow(self, node: fx.Node) -> None:
        read = [value for value in node.all_input_nodes if value in self.places or self._is_scattered(node, value)]
        if not read or node.target in _OF_SIZE_ALONE:
            return
        if node in self.choosers and self.places.keys().isdisjoint(read):
            return
        if node.op == "output":
            for value in read:
                if (self.graph.padding and value not in self.zero) or value in self.graph.tokens.readings:
                    raise self._refusal(node, value)
            self.returned.update(read)
            return
        if all(self._is_of_queries(node, value) for value in read):
            return
        if node in self.packed_only or not isinstance(node.target, OpOverload):
            raise self._refusal(node, read[0])
        with self.graph.gm.graph.inserting_before(node):
            places = {self.places.get(value) or self._all_places(node, value) for value in read}
            if len(places) > 1:
                raise self._refusal(node, read[0])
            if node in self.graph.tokens.readings:
                # Along other axes, as a mask is of keys. It is only read padded: whoever read it packed is refused.
                if not self._keeps_places(node, read, *places):
                    raise self._refusal(node, read[0])
                self.places[node] = places.pop()
            else:
                self._follow(node, read, places.pop())

    def _follow(self, node: fx.Node, read: list[fx.Node], places: fx.Node) -> None:
        mask = self._mask(node, read, places)
        if mask is not None:
            self._hide(node, read[0], mask)
            self._ask(places, mask)
            self.masked.add(node)
            return
        labels = _labels(node, read)
        if labels is not None and self._is_input(labels) and value_of(places).ndim == 1:
            self._ask(places, self._make(aten.ne.Scalar, (labels, argument(node, "ignore_index"))))
            return
        if (picked := self._picked(node, read[0], places)) is not None:
            self._ask(picked)
            self.picked[node] = None if self._is_one_a_row(node, places, picked) else value_of(picked).ndim
            return
        moved = places if self._keeps_places(node, read, places) else self._moved(node, read[0], places)
        if moved is not None:
            self.places[node] = moved
        else:
            raise self._refusal(node, read[0])
        rule = zero_rule_for(node.target)
        if rule is not None and rule(node.args, lambda value: value in self.zero or value in self.packed_only):
            self.zero.add(node)

    def _is_scattered(self, node: fx.Node, value: fx.Node) -> bool:
        """Whether an op without a packed form reads a value that has no other, and stock's is not zero at padding."""
        tokens = self.graph.tokens
        return (
            node in tokens.refusals
            and value in self.packed_only
            and value not in self.graph.zero
            and covers_tokens(tokens.layout(value))
            and not self._is_for_a_cache(node)
        )

    def _is_for_a_cache(self, node: fx.Node) -> bool:
        """Whether it keeps the end of rows whose padding nobody reads, or that mixers see to."""
        return is_kept_end(node, self.graph.tokens.layout) and not self._is_one_position(node)

    def _is_of_queries(self, node: fx.Node, value: fx.Node) -> bool:
        """Whether attention adds a value to its scores, made of each query's own place: ``(B, heads, L, keys)``."""
        reading = self.graph.tokens.readings.get(node)
        asked = reading is not None and any(isinstance(ask, HidesPadding) and ask.mask is value for ask in reading.asks)
        if not (asked or value in biases_of(node)) or value not in self.places:
            return False
        with self.graph.gm.graph.inserting_before(node):
            return self.places[value] is self._places_of_heads(value_of(value).shape[1])

    def _refusal(self, node: fx.Node, value: fx.Node) -> NotPackable:
        reason = self.graph.tokens.refusals.get(node, "reads padding")
        where = module_path(node) or "the model"
        why = "is not zero at padding" if self.graph.padding else "may be of another document in its row"
        return NotPackable(f"{node.target} in {where}: {reason}, and {value.name} {why}")

    def _all_places(self, node: fx.Node, value: fx.Node) -> fx.Node:
        layout = self.graph.tokens.layout(value) or ()
        if layout[:3] == (BATCH, OTHER, SEQ):
            return self._places_of_heads(value_of(value).shape[1])
        if layout[:1] != (TOKENS,) and layout[:2] != (BATCH, SEQ):
            raise self._refusal(node, value)
        return self._flat_places() if layout[0] is TOKENS else self._places_of_rows()

    def _flat_places(self) -> fx.Node:
        ones = self._make(aten.ones_like.default, (self._of_places(),), dtype=torch.int64)
        return self._make(aten.sub.Tensor, (self._make(aten.cumsum.default, (self._flat(ones), 0)), 1))

    def _places_of_rows(self) -> fx.Node:
        """(B, L)"""
        return self._make(aten.view_as.default, (self._flat_places(), self._of_places()))

    def _places_of_heads(self, heads: int) -> fx.Node:
        """(B, heads, L)"""
        rows = self._make(aten.unsqueeze.default, (self._places_of_rows(), 1))
        return self._make(aten.expand.default, (rows, [-1, heads, -1]))

    def _mask(self, node: fx.Node, read: list[fx.Node], places: fx.Node) -> fx.Node | None:
        """What an op multiplies the value by, an entry a place, if that is a mask made from the inputs."""
        if node.target is not aten.mul.Tensor or len(read) > 1:
            return None
        mask: Any = node.args[1] if node.args[0] is read[0] else node.args[0]
        if not is_tensor(mask) or not self._is_input(mask):
            return None
        if not is_made_of_integers(mask) and inputs_of(mask) != {self.graph.mask}:
            return None  # numbers, rather, which may be anything at padding
        sizes, shape = value_of(places).shape, value_of(mask).shape
        ones = len(shape) - len(sizes)
        if len(shape) != value_of(node).ndim or not all(map(same_size, shape, (*sizes, *[1] * ones))):
            return None
        return mask

    def _hide(self, node: fx.Node, value: fx.Node, mask: fx.Node) -> None:
        """Zero where the mask is: what is made of zeros need not be finite, where stock's is."""
        hidden = self._make(aten.eq.Scalar, (mask, 0))
        shown = self.graph.gm.graph.call_function(aten.masked_fill.Scalar, (value, hidden, 0))
        shown.meta = dict(value.meta)
        node.replace_input_with(value, shown)

    def _keeps_places(self, node: fx.Node, read: list[fx.Node], places: fx.Node) -> bool:
        """Whether an op works on the entries of each place alone."""
        value, rank = read[0], value_of(places).ndim
        shape = value_of(node).shape if is_tensor(node) else ()
        if len(shape) < rank or not all(map(same_size, shape[:rank], value_of(places).shape)):
            return False
        if works_behind(node, rank):
            return read == [node.args[0]]
        if node.target is aten.linear.default:
            return read == [node.args[0]] and value_of(value).ndim > rank
        if node.target is aten.cross_entropy_loss.default:
            return read == [node.args[0]] and rank == 1 and value_of(node).ndim == 1
        return is_entrywise(node) and all(self._lies_along(each, places, len(shape)) for each in read)

    @staticmethod
    def _lies_along(value: fx.Node, places: fx.Node, rank: int) -> bool:
        """Whether it has an entry for each place where a result of so many axes has it: not along other axes."""
        sizes, wanted = value_of(value).shape, value_of(places).shape
        return len(sizes) == rank and all(map(same_size, sizes[: len(wanted)], wanted))

    def _moved(self, node: fx.Node, value: fx.Node, places: fx.Node) -> fx.Node | None:
        """The places of the entries where an op takes some, or counts them another way."""
        rank, shape = value_of(places).ndim, value_of(value).shape
        if node.target is aten.slice.Tensor and dims_of(node)[0] < rank:
            return self._make(aten.slice.Tensor, (places, *node.args[1:]))
        if node.target is aten.flatten.using_ints:
            first, last = (dim % len(shape) for dim in (*node.args[1:], *(0, -1)[len(node.args) - 1 :]))  # type: ignore[operator]
            return self._make(aten.flatten.using_ints, (places, first, last)) if last < rank else None
        if node.target in _RESHAPES:
            features, sizes = len(shape) - rank, value_of(node).shape
            kept = len(sizes) - features
            if kept > 0 and all(map(same_size, sizes[kept:], shape[rank:])):
                return self._make(aten.reshape.default, (places, node.args[1][:kept]))  # type: ignore[index]
        return None

    def _picked(self, node: fx.Node, value: fx.Node, places: fx.Node) -> fx.Node | None:
        """The places that one index a row takes, or a slice of one position: logits of the last, to generate from."""
        rank = value_of(places).ndim
        if node.target is aten.slice.Tensor and dims_of(node) == [1] and rank == 2 and self._is_one_position(node):
            return self._make(aten.slice.Tensor, (places, *node.args[1:]))
        if node.target is aten.select.int and dims_of(node)[0] < rank:
            return self._make(aten.select.int, (places, *node.args[1:]))
        if node.target is aten.index.Tensor and node.args[0] is value:
            indices: list[Any] = node.args[1]  # type: ignore[assignment]
            if len(indices) <= rank and all(is_tensor(each) and self._is_input(each) for each in indices):
                return self._make(aten.index.Tensor, (places, indices))
        if node.target is aten.gather.default and node.args[0] is value and dims_of(node)[0] == rank - 1:
            index = node.args[2]
            spread = value_of(index).stride()[rank:]
            if self._is_input(index) and all(
                same_size(step, 0) or same_size(size, 1)
                for step, size in zip(spread, value_of(index).shape[rank:], strict=True)
            ):
                while value_of(index).ndim > rank:
                    index = self._make(aten.select.int, (index, -1, 0))
                return self._make(aten.gather.default, (places, rank - 1, index))
        return None

    def _is_one_a_row(self, node: fx.Node, places: fx.Node, picked: fx.Node) -> bool:
        """Whether of places (B, L) one is picked in each row."""
        rows, *others = value_of(picked).shape
        of_rows = value_of(places).ndim == 2 and same_size(rows, self.graph.sizes[0])
        along_rows = node.target is not aten.select.int or dims_of(node) == [1]
        return of_rows and along_rows and all(same_size(size, 1) for size in others)

    @staticmethod
    def _is_one_position(node: fx.Node) -> bool:
        return same_size(value_of(node).shape[1], 1) and not same_size(value_of(node.args[0]).shape[1], 1)

    def _is_input(self, node: Any) -> bool:
        """Whether a value is known before the model runs."""
        return node.op != "get_attr" and not any(map(is_parameter, inputs_of(node))) and node not in self.places

    def _ask(self, places: fx.Node, kept: fx.Node | None = None) -> None:
        places = self._flat(places)
        live = self._make(aten.ones_like.default, (places,)) if kept is None else self._flat(kept)
        every = self._make(aten.zeros_like.default, (self._flat(self._of_places()),), dtype=torch.int64)
        live = self._make(aten.to.dtype, (live, torch.int64))
        self.live.append(self._make(aten.scatter_add.default, (every, 0, places, live)))

    def _of_places(self) -> fx.Node:
        """Something (B, L)."""
        mask = self.graph.mask
        return mask if value_of(mask).ndim == 2 else self._make(aten.select.int, (mask, -1, 0))

    def _flat(self, value: fx.Node) -> fx.Node:
        return self._make(aten.reshape.default, (value, [-1]))

    def _make(self, target: Any, args: tuple[Any, ...], **kwargs: Any) -> fx.Node:
        """A node, once: places are the same where the same was done to them."""
        key = (target, repr(args), repr(kwargs))
        if key not in self._made:
            node = self.graph.gm.graph.call_function(target, args, kwargs)
            values = fx.map_arg(args, value_of)
            node.meta["val"] = target(*values, **kwargs)
            self._made[key] = node
        return self._made[key]


def _labels(node: fx.Node, read: list[fx.Node]) -> Any:
    """Those of a loss of all rows together, which reads no value but logits."""
    if node.target is not aten.cross_entropy_loss.default or read != [node.args[0]] or value_of(node).ndim:
        return None
    return node.args[1] if not value_of(node.args[1]).is_floating_point() else None
