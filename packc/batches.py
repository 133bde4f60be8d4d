"""What each batch is asked before it is packed, and the index it is packed by.

Everything the host must know comes from the device in one copy: where the tokens of each row begin and end, whether
there is a hole between them, and whether labels outside of them count in the loss.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from packc.boundaries import Given, starts
from packc.fake_tensors import fake_mode_of

_HOLE = "padding between tokens of a row"
_VALUES = "mask values other than 0 and 1"
_BEFORE = "the position before a row's first token is read, where attention sees padding"
_FACTS = 12
_NOWHERE = torch.empty(0, 2, dtype=torch.int64)
_LABEL = "a label that counts in the loss, or what a head reads, on a padding position"


@dataclass(frozen=True)
class Packing:
    """One batch, packed: which tokens, in which documents (one a row, or several), and why rows were left whole."""

    index: Tensor
    """int64 (T,): ``b * L + l`` of every token, row by row."""
    cu_seqlens: Tensor
    """int32 (N + 1,): where each document begins and ends among the tokens; rows end documents."""
    tokens: int
    padded_tokens: int
    rows: int = 0
    whole_rows: int = 0
    reasons: Mapping[str, int] = field(default_factory=dict)
    """Why rows were not packed, and how many for each: a row may have more than one."""
    left_padded: int = 0
    """Rows that begin at their first token, with padding before it."""
    only_tokens: bool = False
    """Whether no position of padding was packed."""
    several: bool = False
    """Whether some row holds several documents."""
    across: bool = False
    """Whether a label of the next token counts where that is another document's."""
    gaps: bool = False
    """Whether the positions of some row leave some out."""
    elsewhere: bool = False
    """Whether documents begin where no ``position_ids`` of the model's arguments start again."""
    offsets: Tensor | None = None
    """``cu_seqlens`` on the host, where it was made."""
    empty: frozenset[int] = frozenset()
    """Rows without a token."""


@dataclass(frozen=True)
class Rows:
    """What is to be packed of one sequence, and what is asked of it."""

    mask: Tensor
    """(B, L), nonzero at tokens."""
    labels: Sequence[tuple[Tensor, int]] = ()
    """Pairs of labels, as the loss reads them (B*L elements, already shifted), and the label it ignores; of what a head
    reads, numbers that are not 0 there, and 0."""
    inside: Sequence[Tensor] = ()
    """Further masks (B, L) or (B, L, 1) that should mark tokens only where ``mask`` does."""
    outside: str | None = None
    """Why rows in which one of them does not must stay whole."""
    boundaries: Sequence[Given] = ()
    """What was handed over of documents within these rows."""
    moved: Sequence[tuple[Tensor, int]] = ()
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


def pack_batch(mask: Tensor, labels: Sequence[tuple[Tensor, int]] = (), **asked: Any) -> Packing:
    """:func:`pack_batches` of one sequence: what is asked by the names in :class:`Rows`."""
    return pack_batches([Rows(mask, labels, **asked)])[0]


@torch.no_grad()
def pack_batches(sequences: Sequence[Rows]) -> list[Packing]:
    """Choose the span of every row that is packed, leaving out nothing that could change a result.

    Raises:
        ValueError: boundaries are of another size than the rows, do not rise to B * L, or disagree with one another.
    """
    facts = [_facts(rows) for rows in sequences]
    flat = torch.cat([each.to(facts[0].device).flatten() for each in facts]).cpu()  # the one host sync
    parts = flat.split([each.numel() for each in facts])
    return [_packing(rows, part.view(each.shape)) for rows, part, each in zip(sequences, parts, facts, strict=True)]


def _packing(rows: Rows, facts: Tensor) -> Packing:
    batch, length = rows.mask.shape
    device = rows.mask.device
    if rows.mask.numel() == 0:
        index, offsets = _index([(0, length)] * batch, _NOWHERE, length, device)
        return Packing(index, offsets.to(device, torch.int32), 0, 0, batch, batch, offsets=offsets)
    facts, begins = facts[:, :_FACTS], facts[:, _FACTS:].nonzero()
    spans, reasons = [], Counter[str]()
    whole_rows = left_padded = real = 0
    for first, end, count, other_values, first_label, end_label, beyond, *_ in facts.tolist():
        start, stop, why = _span(first, end, count, length, other_values, first_label, end_label)
        if why is None and rows.one_before and count:
            start = max(0, first - 1)
        if beyond and rows.outside is not None:
            start, stop, why = 0, length, rows.outside
        if rows.keep_empty is not None and not count:
            start, stop, why = 0, length, rows.keep_empty
        whys = [] if why is None else [why]
        if rows.keep_left is not None and start > 0:
            start, whys = 0, [*whys, rows.keep_left]
        if rows.keep_right is not None and stop < length:
            stop, whys = length, [*whys, rows.keep_right]
        if rows.padding_attends and (start < first or end < stop):
            # What attention gives at padding hangs on all other padding of the row.
            start, stop, whys = 0, length, whys or [_BEFORE]
        whole_rows += bool(whys)
        reasons.update(whys)
        left_padded += 0 < start == first
        real += 0 if other_values else count
        spans.append((start, stop))
    if sum(stop - start for start, stop in spans) < rows.least:
        # Not a fallback: there is next to nothing to pack.
        spans, whole_rows, left_padded = [(0, length)] * batch, batch, 0
    index, offsets = _index(spans, begins, length, device)
    cu_seqlens = offsets.to(device, torch.int32, non_blocking=True)
    tokens = index.shape[0]
    across, gaps, elsewhere, disagree, not_offsets = facts[:, -5:].any(0).tolist()
    _check(rows.boundaries, disagree, not_offsets, batch * length)
    return Packing(
        *(index, cu_seqlens, tokens, batch * length, batch, whole_rows, reasons, left_padded),
        only_tokens=tokens == real,
        several=len(begins) > 0,
        across=across,
        gaps=gaps,
        elsewhere=elsewhere,
        offsets=offsets,
        empty=frozenset(facts[:, 2].eq(0).nonzero()[:, 0].tolist()),
    )


def _check(boundaries: Sequence[Given], disagree: bool, not_offsets: bool, places: int) -> None:
    names = " and ".join(each.name for each in boundaries)
    if not_offsets:
        raise ValueError(f"{names}: the offsets do not rise from 0 to {places}, the positions of all rows")
    if disagree:
        raise ValueError(f"{names} disagree on where documents begin")


def unread_batch(mask: Tensor) -> Packing:
    """The packing of (B, L, ...) whose values nobody can read (fake and meta tensors): every position is a token.

    No real batch of this shape needs more memory or work.
    """
    batch, length = mask.shape[:2]
    with fake_mode_of(mask) or contextlib.nullcontext():
        index = torch.arange(batch * length, device=mask.device)
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=mask.device) * length
    return Packing(index, cu_seqlens, batch * length, batch * length, batch)


def _span(
    first: int, end: int, count: int, length: int, other_values: int, first_label: int, end_label: int
) -> tuple[int, int, str | None]:
    """``[start, stop)`` of one row, and why it is the whole row if it is for a reason."""
    if other_values:
        return 0, length, _VALUES
    if end - first != count:
        return 0, length, _HOLE
    if end_label > end:
        return 0, length, _LABEL
    if first_label < first:
        # The label of a left-padded row's first token lies, shifted, on the padding before it; stock counts it. The
        # state that predicts it has seen only zeros, so it may simply be the document's first.
        if count and first_label == first - 1:
            return first - 1, end, None
        return 0, length, _LABEL
    return first, end, None


def _facts(rows: Rows) -> Tensor:
    """(B, 12): first token, end of tokens, number of tokens, other values?, first live label, end of live labels,
    another mask's token beyond?, a live label where another document follows?, positions left out?, and the same for
    all rows: a document begins where no positions do?, boundaries disagree?, offsets do not rise?

    With boundaries (B, 12 + L): behind these, whether a document begins at each position behind another one.
    """
    mask, length = rows.mask, rows.mask.shape[1]
    real = mask != 0
    if mask.numel() == 0:
        return torch.empty(0, dtype=torch.int64, device=mask.device)
    live = _live(rows.labels, real)
    no = torch.zeros_like(real[:, 0])
    beyond = no
    for other in rows.inside:
        beyond = beyond | ((other.reshape(real.shape) != 0) & ~real).any(1)
    within = [no] * 5
    begins = []
    if rows.boundaries:
        found = starts(rows.boundaries, real)
        across = (_live(rows.moved, real)[:, :-1] & found.begins[:, 1:]).any(1)
        within = [across, found.gaps, *(no | each for each in (found.elsewhere, found.disagree, found.not_offsets))]
        begins = [found.begins.to(torch.int64)]
    first, end, count = _extent(real)
    first_label, end_label, _ = _extent(live)
    columns = [
        first,
        end,
        count,
        (real & (mask != 1)).any(1),
        torch.where(end_label == 0, length, first_label),
        end_label,
        beyond,
        *within,
    ]
    assert len(columns) == _FACTS
    return torch.cat([torch.stack([column.to(torch.int64) for column in columns], 1), *begins], 1)


def _live(labels: Sequence[tuple[Tensor, int]], real: Tensor) -> Tensor:
    """(B, L), bool: where one counts."""
    live = torch.zeros_like(real)
    for values, ignore_index in labels:
        live |= (values != ignore_index).reshape(real.shape)
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


def _index(spans: list[tuple[int, int]], begins: Tensor, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The index of the spans, and on the host the offsets of their documents: ``begins`` (K, 2), row and position of
    those that begin within one."""
    runs = [(b * length + start, stop - start) for b, (start, stop) in enumerate(spans)]
    rows = torch.tensor(runs, dtype=torch.int64).view(-1, 2)
    lengths = rows[:, 1]
    cu_seqlens = torch.zeros(len(spans) + 1, dtype=torch.int64)
    torch.cumsum(lengths, 0, out=cu_seqlens[1:])
    tokens = int(cu_seqlens[-1])
    shifts = rows[:, 0] - cu_seqlens[:-1]
    if len(begins):
        row, position = begins.unbind(1)
        within = row * length + position - shifts[row]
        cu_seqlens = torch.cat([cu_seqlens, within]).sort().values
    shift = shifts.to(device, non_blocking=True).repeat_interleave(
        lengths.to(device, non_blocking=True), output_size=tokens
    )
    return torch.arange(tokens, device=device) + shift, cu_seqlens
