"""What each batch is asked before it is packed: where the tokens of each row begin and end, whether there is a hole
between them, whether labels outside of them count in the loss, and where documents begin.

All of it comes from the device in one copy. On a CPU one walk over mask and labels, in C++ (``ops/csrc/batch.cpp``),
tells what takes plain torch two dozen small ops; those say what the columns mean, and run everywhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from packc.boundaries import Given, Kind, Starts, fitting, starts
from packc.ops import autograd, cpu_library, dispatch

_NOWHERE = torch.empty(0, 2, dtype=torch.int64)
_OF_DOCUMENTS = 5
_WALKS = [(Kind.POSITIONS, False), (Kind.POSITIONS, True), (Kind.NUMBERS, False), (Kind.OFFSETS, False)]
"""In the order of the C++ library's ``Walk``."""
_INTEGERS = frozenset((torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64))
_NUMBERS = _INTEGERS | {torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64}


class Labelled(NamedTuple):
    """Labels, as the loss reads them, once they are shifted; or of what a head reads, numbers that are not 0 there."""

    values: Tensor
    """B*L elements, row by row."""
    ignore_index: int
    """The label that the loss ignores."""
    ahead: int = 0
    """By how many positions they are still to be shifted: a position's label is that of one so many further on in its
    row, and ignored where there is none."""


@dataclass(frozen=True)
class Rows:
    """What is to be packed of one sequence, and what is asked of it."""

    mask: Tensor
    """(B, L), nonzero at tokens."""
    labels: Sequence[Labelled] = ()
    inside: Sequence[Tensor] = ()
    """Further masks (B, L) or (B, L, 1) that should mark tokens only where ``mask`` does."""
    outside: str | None = None
    """Why rows in which one of them does not must stay whole."""
    boundaries: Sequence[Given] = ()
    """What was handed over of documents within these rows."""
    moved: Sequence[Labelled] = ()
    """Those of the labels that are other tokens', the next ones' as a rule."""
    one_before: bool = False
    """A left-padded row begins one position before its first token, whatever its labels."""
    padding_attends: bool = False
    """Whether padding that stays in may be read of an attention: all of its row stays in with it."""
    keep_left: str | None = None
    """Why padding before a row's tokens must stay in; None if it may go."""
    keep_right: str | None = None
    """The same for padding after them."""
    keep_empty: str | None = None
    """Why rows without a token must stay whole."""
    least: int = 2
    """How many tokens the compiled graph is made for; where there are fewer, all rows stay whole."""


class OfRows(NamedTuple):
    """Facts of each row, ``(B,)``; a row's are in this order."""

    first: Tensor
    """Token."""
    end: Tensor
    """One past the last token."""
    tokens: Tensor
    """How many there are. All three are 0 where there is none."""
    other_values: Tensor
    """Whether the mask has any but 0 and 1."""
    first_label: Tensor
    """That counts; L if none does."""
    end_label: Tensor
    beyond: Tensor
    """Whether another mask has a token where this one has none."""


@dataclass(frozen=True)
class Facts:
    """Of a batch, on the host."""

    rows: Sequence[Sequence[int]]
    """Of each the fields of :class:`OfRows`."""
    in_cpp: bool = False
    """Whether the C++ library told them, and can make the index."""
    begins: Tensor = field(default_factory=lambda: _NOWHERE)
    """(K, 2): row and position of each token that begins a document behind another one in its row."""
    across: bool = False
    """Whether a label of the next token counts where that is another document's."""
    gaps: bool = False
    """Whether the positions of some row leave some out."""
    elsewhere: bool = False
    """Whether documents begin where no positions of the model's arguments start again."""
    disagree: bool = False
    """Whether boundaries say different things."""
    not_offsets: bool = False
    """Whether offsets do not rise from 0 to B * L."""


def facts_of(sequences: Sequence[Rows]) -> list[Facts]:
    """
    Raises:
        ValueError: boundaries are of another size than the rows.
    """
    if all(map(_in_cpp, sequences)):
        return [_in_one_walk(rows) for rows in sequences]
    found = [_columns(rows) for rows in sequences]
    device = found[0].device
    flat = torch.cat([each.to(device).flatten() for each in found]).cpu()  # the one host sync
    parts = flat.split([each.numel() for each in found])
    return [_of_columns(part.view(each.shape)) for part, each in zip(parts, found, strict=True)]


def _in_cpp(rows: Rows) -> bool:
    asked = [rows.mask, *(each.values for each in (*rows.labels, *rows.moved)), *rows.inside]
    given = [each.values for each in rows.boundaries]
    return (
        autograd.runs_on_cpu(*asked, *given)
        and dispatch.wanted_kernels() in ("auto", "cpu")
        and _NUMBERS.issuperset(each.dtype for each in asked)
        and _INTEGERS.issuperset(each.dtype for each in given)
        and all(each.is_cpu for each in given)  # the others are where the mask is
        and rows.mask.numel() > 0
        and cpu_library.load("batch")
    )


def _in_one_walk(rows: Rows) -> Facts:
    of_rows = torch.ops.packc_batch.facts.default(rows.mask, *_columns_of(rows.labels), rows.inside).tolist()
    if not rows.boundaries:
        return Facts(of_rows, True)
    fit = [(each, values) for each in rows.boundaries if (values := fitting(each, *rows.mask.shape)) is not None]
    names = [each.name for each in rows.boundaries]
    begins, of_documents = torch.ops.packc_batch.documents.default(
        rows.mask,
        [values for _, values in fit],
        [_WALKS.index((each.kind, each.strictly)) for each, _ in fit],
        [names.index(each.name) for each, _ in fit],
        [each.of_model for each, _ in fit],
        *_columns_of(rows.moved),
    )
    return Facts(of_rows, True, begins, *map(bool, of_documents))


def _columns_of(labels: Sequence[Labelled]) -> Iterable[Sequence[Any]]:
    return zip(*labels, strict=True) if labels else ((), (), ())


def _of_columns(columns: Tensor) -> Facts:
    of_rows = columns[:, : len(OfRows._fields)].tolist()
    documents = columns[:, len(OfRows._fields) :]
    if not documents.shape[1]:
        return Facts(of_rows)
    of_documents = documents[:, :_OF_DOCUMENTS].any(0).tolist()
    return Facts(of_rows, False, documents[:, _OF_DOCUMENTS:].nonzero(), *of_documents)


def _columns(rows: Rows) -> Tensor:
    """(B, 7): facts of the rows, int64. With boundaries (B, 12 + L): behind these what :class:`Facts` says of
    documents, and at each position whether one begins there behind another."""
    mask, length = rows.mask, rows.mask.shape[1]
    if mask.numel() == 0:
        return torch.zeros(mask.shape[0], len(OfRows._fields), dtype=torch.int64, device=mask.device)
    real = mask != 0
    first, end, count = _extent(real)
    first_label, end_label, _ = _extent(_live(rows.labels, real))
    beyond = torch.zeros_like(real[:, 0])
    for other in rows.inside:
        beyond = beyond | ((other.reshape(real.shape) != 0) & ~real).any(1)
    of_rows = OfRows(
        first,
        end,
        count,
        other_values=(real & (mask != 1)).any(1),
        first_label=torch.where(end_label == 0, length, first_label),
        end_label=end_label,
        beyond=beyond,
    )
    columns = [each.to(torch.int64)[:, None] for each in of_rows]
    if rows.boundaries:
        found, *of_documents = _documents(rows, real)
        columns += [each.to(torch.int64).expand(len(real))[:, None] for each in of_documents]
        columns.append(found.begins.to(torch.int64))
    return torch.cat(columns, 1)


def _documents(rows: Rows, real: Tensor) -> tuple[Starts, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What boundaries say, and of it what :class:`Facts` says of documents, of each row or of all."""
    found = starts(rows.boundaries, real)
    across = (_live(rows.moved, real)[:, :-1] & found.begins[:, 1:]).any(1)
    return found, across, found.gaps, found.elsewhere, found.disagree, found.not_offsets


def _live(labels: Sequence[Labelled], real: Tensor) -> Tensor:
    """(B, L), bool: where one counts."""
    live = torch.zeros_like(real)
    for values, ignore_index, ahead in labels:
        counts = (values != ignore_index).reshape(real.shape)
        live[:, : real.shape[1] - ahead] |= counts[:, ahead:]
    return live


def _extent(real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First true position, one past the last, and how many, by row; (0, 0, 0) for an empty row."""
    length = real.shape[1]
    number = real.to(torch.uint8)
    count = real.sum(1)
    empty = count == 0
    first = number.argmax(1)
    end = length - number.flip(1).argmax(1)
    return first.masked_fill(empty, 0), end.masked_fill(empty, 0), count
