"""The packed form ``(1, T, ...)``: padding left out, documents end to end."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple, Protocol

import torch
from torch import fx

from packc.passes.axes import BATCH, FLAT, OTHER, SEQ, TOKENS, Axis, Layout, same_size
from packc.passes.forms.form import Write
from packc.passes.forms.padded import Padded
from packc.passes.reading import Call, InChunks

aten = torch.ops.aten


class Inputs(NamedTuple):
    """What the graph is told of a batch, in this order."""

    index: Any
    """int64 (T,): where the tokens are in the padded batch."""
    cu_seqlens: Any
    """int32 (N + 1,): where documents begin among them."""


class _Places(Protocol):
    @property
    def index(self) -> fx.Node: ...

    @property
    def cu_seqlens(self) -> fx.Node: ...


class Packed:
    """Values gathered by ``index`` (T,), documents between ``cu_seqlens`` (N + 1,)."""

    INPUTS: tuple[str, ...] = Inputs._fields
    is_part = False

    def __init__(self, write: Write, inputs: _Places, mask: fx.Node, shape: Any) -> None:
        self.write, self.index, self.cu_seqlens = write, inputs.index, inputs.cu_seqlens
        self.tokens = write(aten.sym_size.int, self.index, 0)
        self.padded = Padded(write, mask, shape)
        self.shape = shape
        self._rows: fx.Node | None = None
        self._by_position: fx.Node | None = None
        self._positions: dict[fx.Node, fx.Node] = {}
        self._ends: dict[int, tuple[fx.Node, fx.Node]] = {}
        self._in_chunks: dict[int, fx.Node] = {}

    def size(self, axis: Axis) -> Any:
        return 1 if axis is BATCH else self.tokens

    def mixer(self, call: Call) -> Call:
        # What attends from one sequence to another is told of its keys first.
        of_keys = "cu_seqlens_k" in call.arguments and call.args[call.arguments.index("cu_seqlens_k")] is None
        place = call.arguments.index("cu_seqlens_k" if of_keys else "cu_seqlens")
        given = call.args[place]
        cu_seqlens = self.in_chunks(given.size) if isinstance(given, InChunks) else self.cu_seqlens
        return call._replace(args=(*call.args[:place], cu_seqlens, *call.args[place + 1 :]))

    def total(self, value: fx.Node) -> fx.Node:
        return value

    def enter(self, padded: fx.Node, layout: Layout, shape: Any, *, by_position: bool = False) -> fx.Node:
        index = self.by_position() if by_position else self.index
        if FLAT in layout:
            apart, at = _features_apart(layout)
            sizes = (*shape[:at], *self.shape, 1, *shape[at + 1 :])
            split = self.write(aten.unflatten.int, padded, at, [self.padded.batch, self.padded.length, -1])
            entered = self.enter(split, apart, sizes, by_position=by_position)
            return self.write(aten.flatten.using_ints, entered, at, at + 2)
        along = spans(layout, shape)
        if TOKENS in layout:
            return self.write(aten.index_select.default, padded, layout.index(TOKENS), index)
        if along == {SEQ}:
            return self.write(aten.index_select.default, padded, layout.index(SEQ), self.positions(index))
        if along == {BATCH}:
            rows = self.write(aten.index_select.default, padded, layout.index(BATCH), self.rows())
            return self.write(aten.transpose.int, rows, layout.index(BATCH), layout.index(SEQ))
        order = _front(layout)
        front = self._permuted(padded, order)
        if by_position:  # where documents of one row read the same place, and pack takes none twice
            flat = self.write(aten.flatten.using_ints, front, 0, 1)
            taken = self.write(aten.index_select.default, flat, 0, index)
            packed = self.write(aten.unsqueeze.default, taken, 0)
        else:
            packed = self.write(torch.ops.packc.pack.default, front, index)
        return self._permuted(packed, _inverse(order))

    def leave(self, value: fx.Node, layout: Layout, shape: Any) -> fx.Node:
        if FLAT in layout:
            apart, at = _features_apart(layout)
            split = self.write(aten.unflatten.int, value, at, [1, self.tokens, -1])
            return self.write(aten.flatten.using_ints, self.leave(split, apart, shape), at, at + 2)
        order = _front(layout)
        front = self._permuted(value, order)
        if TOKENS in layout:
            rows = self.write(aten.unsqueeze.default, front, 0)
            front = self.write(aten.flatten.using_ints, self._unpacked(rows), 0, 1)
        else:
            front = self._unpacked(front)
        return self._permuted(front, _inverse(order))

    def leave_end(self, value: fx.Node, layout: Layout, size: int) -> fx.Node:
        """The last positions of every row of a value, padded: without a padded value of all positions."""
        at, absent = self._ends_of_rows(size)
        order = _front(layout)
        rows = self.write(aten.squeeze.dim, self._permuted(value, order), 0)
        taken = self.write(aten.index_select.default, rows, 0, at)
        absent = self.write(aten.view.default, absent, [-1, *[1] * (len(layout) - 2)])
        masked = self.write(aten.masked_fill.Scalar, taken, absent, 0)
        ends = self.write(aten.unflatten.int, masked, 0, [self.padded.batch, size])
        return self._permuted(ends, _inverse(order))

    def _ends_of_rows(self, size: int) -> tuple[fx.Node, fx.Node]:
        if size not in self._ends:
            of = self.index, self.padded.batch, self.padded.length, size
            both = self.write(torch.ops.packc.row_ends.default, *of)
            self._ends[size] = self.write(operator.getitem, both, 0), self.write(operator.getitem, both, 1)
        return self._ends[size]

    def rows(self) -> fx.Node:
        """The row of every token."""
        if self._rows is None:
            self._rows = self.write(aten.div.Scalar_mode, self.index, self.padded.length, rounding_mode="floor")
        return self._rows

    def by_position(self) -> fx.Node:
        """The index, as it would be if every document in a row were its first."""
        if self._by_position is None:
            of = self.index, self.cu_seqlens, self.padded.length
            self._by_position = self.write(torch.ops.packc.counted_anew.default, *of)
        return self._by_position

    def in_chunks(self, size: int) -> fx.Node:
        """Where chunks of documents begin."""
        if size not in self._in_chunks:
            of = self.cu_seqlens, self.tokens, size
            self._in_chunks[size] = self.write(torch.ops.packc.in_chunks.default, *of)
        return self._in_chunks[size]

    def positions(self, index: fx.Node) -> fx.Node:
        """The position in its row of every place in an index."""
        if index not in self._positions:
            # Opaque, for Inductor would compute a remainder in every loop that takes something by it.
            self._positions[index] = self.write(torch.ops.packc.positions.default, index, self.padded.length)
        return self._positions[index]

    def _unpacked(self, value: fx.Node) -> fx.Node:
        return self.write(torch.ops.packc.unpack.default, value, self.index, self.padded.batch, self.padded.length)

    def _permuted(self, value: fx.Node, order: list[int] | None) -> fx.Node:
        return value if order is None else self.write(aten.permute.default, value, order)


def spans(layout: Layout, shape: Any) -> set[Axis]:
    """The axes of tokens along which a value has several entries."""
    return {kind for kind, size in zip(layout, shape, strict=True) if not same_size(size, 1)} - {OTHER}


def _features_apart(layout: Layout) -> tuple[Layout, int]:
    """The layout with rows, positions and the features flattened with them as axes of their own, from which on."""
    at = layout.index(FLAT)
    return (*layout[:at], BATCH, SEQ, OTHER, *layout[at + 1 :]), at


def _front(layout: Layout) -> list[int] | None:
    """The permutation that brings the token axes to the front; None if they are there."""
    first = [layout.index(TOKENS)] if TOKENS in layout else [layout.index(BATCH), layout.index(SEQ)]
    there = first == list(range(len(first)))
    return None if there else first + [axis for axis in range(len(layout)) if axis not in first]


def _inverse(order: list[int] | None) -> list[int] | None:
    return order and [order.index(axis) for axis in range(len(order))]
