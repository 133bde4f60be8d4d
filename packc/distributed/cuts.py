"""Where a stream is cut so that ranks have equally much to do, though not equally many tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from packc.passes.work import Work


def equal_work(offsets: Sequence[int], size: int, work: Work, least: int) -> tuple[int, ...]:
    """``size + 1`` offsets of shards of at least ``least`` tokens, where there are ``size * least`` or more.

    In integers alone: all ranks find the same. A shard has at most one token's work more than its share.
    """
    ends = work_of_tokens(offsets, work).cumsum(0)
    tokens, total = len(ends), int(ends[-1])
    cuts = [0]
    for rank in range(1, size):
        wanted = int(torch.searchsorted(ends, total * rank // size, right=True))
        cuts.append(min(max(wanted, cuts[-1] + least), tokens - least * (size - rank)))
    return (*cuts, tokens)


def work_of_tokens(offsets: Sequence[int], work: Work) -> Tensor:
    """int64 ``(T,)``, of documents between ``offsets``."""
    edges = torch.tensor(offsets)
    lengths = edges.diff()
    before = torch.arange(int(edges[-1])) - edges[:-1].repeat_interleave(lengths)
    behind = lengths.repeat_interleave(lengths) - before - 1
    found = torch.full_like(before, work.token)
    for pairs in work.pairs:
        reach = len(found) if pairs.window is None else pairs.window - 1
        found += pairs.flops * (1 + before.clamp(max=reach))
        if not pairs.causal:
            found += pairs.flops * behind.clamp(max=reach)
    return found
