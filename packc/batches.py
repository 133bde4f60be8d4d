"""How each batch is packed: which span of every row, leaving out nothing that could change a result, and the index."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from packc.boundaries import Given
from packc.facts import Facts, Rows, facts_of
from packc.fake_tensors import fake_mode_of

_HOLE = "padding between tokens of a row"
_VALUES = "mask values other than 0 and 1"
_BEFORE = "the position before a row's first token is read, where attention sees padding"
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


def pack_batches(sequences: Sequence[Rows]) -> list[Packing]:
    """Choose the span of every row that is packed, leaving out nothing that could change a result.

    Raises:
        ValueError: boundaries are of another size than the rows, do not rise to B * L, or disagree with one another.
    """
    return [_packing(rows, facts) for rows, facts in zip(sequences, facts_of(sequences), strict=True)]


def _packing(rows: Rows, facts: Facts) -> Packing:
    batch, length = rows.mask.shape
    if rows.mask.numel() == 0:
        index, cu_seqlens, offsets = _index(rows, [(0, length)] * batch, facts)
        return Packing(index, cu_seqlens, 0, 0, batch, batch, offsets=offsets)
    spans: list[tuple[int, int]] = []
    reasons: Counter[str] = Counter()  # what a subscript calls is slower
    whole_rows = left_padded = real = 0
    outside, keep_empty, keep_left, keep_right = rows.outside, rows.keep_empty, rows.keep_left, rows.keep_right
    weighs = any(other_values for _, _, _, other_values, *_ in facts.rows)
    for first, end, count, other_values, first_label, end_label, beyond in facts.rows:
        start, stop, why = _span(first, end, count, length, other_values, first_label, end_label)
        if why is None and rows.one_before and count:
            start = max(0, first - 1)
        if beyond and outside is not None:
            start, stop, why = 0, length, outside
        if weighs and not count:  # of a mask that is added, the row is all tokens
            start, stop, why = 0, length, _VALUES
        if keep_empty is not None and not count:
            start, stop, why = 0, length, keep_empty
        whys: tuple[str, ...] = () if why is None else (why,)
        if keep_left is not None and start > 0:
            start, whys = 0, (*whys, keep_left)
        if keep_right is not None and stop < length:
            stop, whys = length, (*whys, keep_right)
        if rows.padding_attends and (start < first or end < stop):
            # What attention gives at padding hangs on all other padding of the row.
            start, stop, whys = 0, length, whys or (_BEFORE,)
        if whys:
            whole_rows += 1
            reasons.update(whys)
        left_padded += 0 < start == first
        real += 0 if other_values else count
        spans.append((start, stop))
    if sum(stop - start for start, stop in spans) < rows.least:
        # Not a fallback: there is next to nothing to pack.
        spans, whole_rows, left_padded = [(0, length)] * batch, batch, 0
    index, cu_seqlens, offsets = _index(rows, spans, facts)
    tokens = index.shape[0]
    _check(rows.boundaries, facts.disagree, facts.not_offsets, batch * length)
    return Packing(
        *(index, cu_seqlens, tokens, batch * length, batch, whole_rows, reasons, left_padded),
        only_tokens=tokens == real,
        several=len(facts.begins) > 0,
        across=facts.across,
        gaps=facts.gaps,
        elsewhere=facts.elsewhere,
        offsets=offsets,
        empty=frozenset(row for row, (_, _, count, *_) in enumerate(facts.rows) if not count),
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


def _index(rows: Rows, spans: list[tuple[int, int]], facts: Facts) -> tuple[Tensor, Tensor, Tensor]:
    """The index of the spans, the offsets of their documents as int32, and the same on the host as int64."""
    length, device, begins = rows.mask.shape[1], rows.mask.device, facts.begins
    if facts.in_cpp:
        starts, stops = zip(*spans, strict=True)
        made: tuple[Tensor, Tensor, Tensor] = torch.ops.packc_batch.index.default(starts, stops, begins, length)
        return made
    runs = [(b * length + start, stop - start) for b, (start, stop) in enumerate(spans)]
    first, lengths = torch.tensor(runs, dtype=torch.int64).view(-1, 2).unbind(1)
    offsets = torch.zeros(len(spans) + 1, dtype=torch.int64)
    torch.cumsum(lengths, 0, out=offsets[1:])
    tokens = int(offsets[-1])
    shifts = first - offsets[:-1]
    if len(begins):
        row, position = begins.unbind(1)
        within = row * length + position - shifts[row]
        offsets = torch.cat([offsets, within]).sort().values
    shift = shifts.to(device, non_blocking=True).repeat_interleave(
        lengths.to(device, non_blocking=True), output_size=tokens
    )
    return torch.arange(tokens, device=device) + shift, offsets.to(device, torch.int32, non_blocking=True), offsets
