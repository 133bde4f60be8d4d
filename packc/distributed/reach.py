"""Of which other ranks' tokens attention wants keys and values: those of the documents that reach into its shard."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from packc.distributed.routing import route


@dataclass(frozen=True, eq=False)
class Reach:
    """Of one rank, as tensors. Numbers of tokens are sizes of empty tensors, ``(n + 2, 0)``: to compilers, 0 and 1 are
    special."""

    sent: Tensor
    """This rank's tokens that others want, in the order of those others: int64."""
    sends: list[Tensor]
    """To each rank, how many."""
    receives: list[Tensor]
    """From each rank."""
    left: Tensor
    """How many of the latter come before this rank's tokens."""
    spans: Tensor
    """``(2, 5)``: as ``packc::attention_spans`` wants them, of this rank's documents that are cut."""
    of_cut: Tensor
    """Of each token of this rank: whether it is in one of them: bool ``(T_r,)``."""


def reach(stream: Sequence[int], cuts: Sequence[int], rank: int, causal: bool, device: torch.device) -> Reach:
    size, low = len(cuts) - 1, cuts[rank]
    wanted = [_wanted(stream, cuts, other, causal) for other in range(size)]
    sent = [_overlap(cuts, rank, other, wanted[other]) for other in range(size)]
    received = [_overlap(cuts, other, rank, wanted[rank]) for other in range(size)]
    left = sum(map(len, received[:rank]))
    mine = route(stream, cuts, rank)
    tokens = mine.cu_seqlens[-1]
    spans = []
    if mine.enters is not None:
        # Of a document that goes through, what comes from the right belongs to it as well.
        through = mine.leaves == mine.enters
        last = left + (tokens + sum(map(len, received[rank:])) if through else mine.end)
        spans.append([0, mine.end, 0, last, left])
    if mine.begins and not causal:
        last = left + tokens + sum(map(len, received[rank:]))
        spans.append([mine.begin, tokens, left + mine.begin, last, left])
    spans += [[0] * 5] * (2 - len(spans))
    of_cut = torch.zeros(tokens, dtype=torch.bool)
    for begin, end, *_ in spans:
        of_cut[begin:end] = True
    made = Reach(
        sent=torch.cat([torch.arange(each.start - low, each.stop - low) for each in sent]).to(device),
        sends=_sizes(map(len, sent), device),
        receives=_sizes(map(len, received), device),
        left=_sizes([left], device)[0],
        spans=torch.tensor(spans, device=device),
        of_cut=of_cut.to(device),
    )
    if "torch._dynamo" in sys.modules:
        torch._dynamo.mark_static(made.spans)
        for marker in (*made.sends, *made.receives, made.left):
            torch._dynamo.maybe_mark_dynamic(marker, 0)
    return made


def count(marker: Tensor) -> int:
    """What a size says."""
    return marker.shape[0] - 2


def _sizes(counts: Iterable[int], device: torch.device) -> list[Tensor]:
    return [torch.empty((n + 2, 0), device=device) for n in counts]


def _wanted(stream: Sequence[int], cuts: Sequence[int], rank: int, causal: bool) -> tuple[int, int]:
    """Where the documents of a rank's tokens begin and end."""
    mine, (low, high) = route(stream, cuts, rank), cuts[rank : rank + 2]
    return (
        low if mine.enters is None else stream[mine.enters],
        high if causal or mine.leaves is None else stream[mine.leaves + 1],
    )


def _overlap(cuts: Sequence[int], holder: int, rank: int, wanted: tuple[int, int]) -> range:
    if holder == rank:
        return range(0)
    return range(max(cuts[holder], wanted[0]), max(min(cuts[holder + 1], wanted[1]), max(cuts[holder], wanted[0])))
