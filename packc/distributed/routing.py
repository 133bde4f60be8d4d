"""Who continues whose documents: where a packed stream was cut, as seen from one rank. Plain Python.

A stream of T tokens is cut at ``cuts = [0, ..., T]``; rank q holds the tokens ``cuts[q] : cuts[q + 1]``, its shard, and
of a document with tokens on several ranks each has a segment. Shards may be empty.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Routing:
    """Of one rank. Places of tokens count from the beginning of its shard."""

    cu_seqlens: list[int]
    """Of all documents: those that are elsewhere are empty here."""
    begin: int
    """Of the last segment, if its document goes on to the right; otherwise behind the last token."""
    end: int
    """Of the first segment, if its document comes from the left; otherwise 0."""
    enters: int | None
    """The document that comes from the left, and that has tokens here."""
    leaves: int | None
    """The document that goes on to the right, and that has tokens here."""
    ends: list[bool]
    """Of each document: whether its final state is this rank's to give. It is exactly one rank's."""
    reset: list[bool]
    """Of each rank: it has tokens, and the document of its last one begins there. No state passes through it."""
    stop: list[bool]
    """Of each rank: it has tokens, and the document of its first one ends there. No gradient passes through it."""

    @property
    def begins(self) -> bool:
        """Whether the document that leaves begins here."""
        return self.leaves is not None and self.leaves != self.enters


def route(cu_seqlens: Sequence[int], cuts: Sequence[int], rank: int) -> Routing:
    """The routing of ``rank``, for offsets that fit each other."""
    low, high = cuts[rank], cuts[rank + 1]
    local = [min(max(offset, low), high) - low for offset in cu_seqlens]
    enters = leaves = None
    if low < high:
        first, last = document_of(cu_seqlens, low), document_of(cu_seqlens, high - 1)
        enters = first if cu_seqlens[first] < low else None
        leaves = last if cu_seqlens[last + 1] > high else None
    return Routing(
        cu_seqlens=local,
        begin=high - low if leaves is None else local[leaves],
        end=0 if enters is None else local[enters + 1],
        enters=enters,
        leaves=leaves,
        ends=[bisect_left(cuts, end, lo=1) - 1 == rank for end in cu_seqlens[1:]],
        reset=[low < high and cu_seqlens[document_of(cu_seqlens, high - 1)] >= low for low, high in pairwise(cuts)],
        stop=[low < high and cu_seqlens[document_of(cu_seqlens, low) + 1] <= high for low, high in pairwise(cuts)],
    )


def held(cu_seqlens: Sequence[int], cuts: Sequence[int], rank: int) -> range:
    """The documents of which ``rank`` has tokens, or whose final states are its to give: they are consecutive."""
    low, high = cuts[rank : rank + 2]
    ends = cu_seqlens[1:]
    first = bisect_right(ends, low) if rank else 0
    behind = bisect_right(ends, high)
    goes_on = low < high and behind < len(ends) and cu_seqlens[behind] < high
    return range(first, max(first, behind + goes_on))


def document_of(cu_seqlens: Sequence[int], token: int) -> int:
    return bisect_right(cu_seqlens, token) - 1


def longest_span(cu_seqlens: Sequence[int], cuts: Sequence[int]) -> tuple[int, int]:
    """``(document, hops)``: of which document the first and the last token are the farthest apart, in ranks."""
    spans = [
        (n, bisect_left(cuts, end, lo=1) - bisect_right(cuts, start)) if end > start else (n, 0)
        for n, (start, end) in enumerate(pairwise(cu_seqlens))
    ]
    return max(spans, key=lambda span: span[1])


def steps(size: int) -> list[int]:
    """Distances of a doubling exchange over ``size`` ranks: 1, 2, 4, ..."""
    return [1 << step for step in range((size - 1).bit_length())]


def keeps(reset: Sequence[bool], rank: int) -> list[bool]:
    """Of each step of a doubling exchange: whether what lies farther left than ``distance`` cannot reach ``rank``."""
    return [rank < distance or any(reset[rank - distance + 1 : rank]) for distance in steps(len(reset))]
