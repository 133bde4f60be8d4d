"""Long documents in pieces, one a batch, with the state that a recurrence has at the end of one carried to the next."""

from __future__ import annotations

import random
from bisect import bisect_right, insort
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from packc.data.sampler import ranks_of

CONTINUES = "continues"


class Piece(NamedTuple):
    """Tokens ``start : stop`` of a document."""

    document: int
    """Its position in the data set."""
    start: int
    stop: int
    continues: int
    """The place, in the batch before of the same rank, of the piece before it; -1 for a document's first."""


class CarryingBatchSampler:
    """Batches of pieces with at most ``budget`` tokens each: a document of more than ``longest`` tokens comes in pieces
    of as many, the last one shorter, in one batch after the other of one rank.

    A ``batch_sampler`` of :class:`torch.utils.data.DataLoader` over :class:`Pieces`. Every rank takes as many steps. A
    step is made of what documents under way come to, and of others, as long as some of a window fit: drawn, or without
    ``shuffle`` the longest, as at the end of every batch. Deterministic given ``seed``; resumable by
    :meth:`state_dict`, which is the number of steps: they are planned again, not read.

    Args:
        lengths: tokens of each document, at least 1.
        budget: tokens of a batch.
        longest: tokens of a piece, at most ``budget``.
        window: documents among which is chosen.
        shuffle: whether documents are begun in another order each epoch.
        seed: of these orders.
        rank, world_size: of the data-parallel ranks; those of ``torch.distributed`` where it is initialised.

    Where documents under way are fewer than ranks, at the end of an epoch, the other ranks are given the beginnings of
    documents that have been, so that steps are as many on all.

    Raises:
        ValueError: there are no documents, or a length or another argument is out of range.
    """

    def __init__(
        self,
        lengths: Sequence[int] | Tensor,
        budget: int,
        longest: int,
        *,
        window: int = 1024,
        shuffle: bool = True,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self.lengths: list[int] = lengths.tolist() if isinstance(lengths, Tensor) else list(lengths)
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError("lengths: there must be documents, of at least one token each")
        if not 1 <= longest <= budget:
            raise ValueError(f"longest must be from 1 to the budget of {budget} tokens, not {longest}")
        if window < 1:
            raise ValueError(f"window must be 1 or more, not {window}")
        self.rank, self.world_size = ranks_of(rank, world_size)
        self.budget, self.longest, self.window, self.shuffle, self.seed = budget, longest, window, shuffle, seed
        self._epoch = self._step = 0
        self._resumes = False

    def __iter__(self) -> Iterator[list[Piece]]:
        for step in self.steps():
            yield step[self.rank]

    def __len__(self) -> int:
        """Steps of this epoch, which it plans."""
        return sum(1 for _ in self._plan(self._epoch))

    def steps(self) -> Iterator[list[list[Piece]]]:
        """The batches of all ranks, step by step: of a whole epoch, or what a loaded state leaves of it."""
        if not self._resumes:
            self._step = 0
        self._resumes = False
        for number, step in enumerate(self._plan(self._epoch)):
            if number >= self._step:
                self._step = number + 1
                yield step
        self._epoch, self._step = self._epoch + 1, 0

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration is of; one that ran to its end is followed by the next without."""
        if epoch != self._epoch:
            self._epoch, self._step, self._resumes = epoch, 0, False

    def state_dict(self) -> dict[str, Any]:
        """Where it is. States of recurrences are the model's to keep: those of the last batch."""
        return {"arguments": self._arguments(), "epoch": self._epoch, "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: the state is that of a sampler with other arguments.
        """
        if state["arguments"] != self._arguments():
            raise ValueError(f"the state is that of another sampler: {state['arguments']} is not {self._arguments()}")
        self._epoch, self._step, self._resumes = state["epoch"], state["step"], True

    def _arguments(self) -> dict[str, Any]:
        names = ("budget", "longest", "window", "shuffle", "seed", "world_size")
        return {"documents": len(self.lengths), "tokens": sum(self.lengths), **{n: getattr(self, n) for n in names}}

    def _plan(self, epoch: int) -> Iterator[list[list[Piece]]]:
        order, draw = self._order(epoch), random.Random(str((self.seed, epoch)))
        waiting: list[tuple[int, int]] = []  # (tokens of the first piece, document), rising
        before: list[list[Piece]] = [[] for _ in range(self.world_size)]
        begun: list[int] = []
        while True:
            step = [self._continued(pieces) for pieces in before]
            room = [self.budget - sum(each.stop - each.start for each in pieces) for pieces in step]
            while True:
                if len(waiting) <= self.window // 2:
                    for document in order:
                        insort(waiting, (self._first(document), document))
                        if len(waiting) == self.window:
                            break
                rank = max(range(self.world_size), key=room.__getitem__)
                fits = bisect_right(waiting, (room[rank], len(self.lengths)))
                if not fits:
                    break
                anything = self.shuffle and room[rank] >= self.longest
                tokens, document = waiting.pop(draw.randrange(fits) if anything else fits - 1)
                begun.append(document)  # those that idle ranks are given again
                step[rank].append(Piece(document, 0, tokens, -1))
                room[rank] -= tokens
            if not any(step):
                return
            before = step
            again = [Piece(document, 0, self._first(document), -1) for document in begun[: self.world_size]]
            yield [pieces or [again[n % len(again)]] for n, pieces in enumerate(step)]

    def _first(self, document: int) -> int:
        return min(self.lengths[document], self.longest)

    def _continued(self, pieces: list[Piece]) -> list[Piece]:
        going_on = [(n, each) for n, each in enumerate(pieces) if each.stop < self.lengths[each.document]]
        return [
            Piece(each.document, each.stop, min(each.stop + self.longest, self.lengths[each.document]), n)
            for n, each in going_on
        ]

    def _order(self, epoch: int) -> Iterator[int]:
        if not self.shuffle:
            return iter(range(len(self.lengths)))
        generator = torch.Generator().manual_seed(random.Random(str((self.seed, epoch))).randrange(2**63))
        return iter(torch.randperm(len(self.lengths), generator=generator).tolist())


class Pieces:
    """A data set of documents, of which a :class:`Piece` is one example: the same with its tokens alone, and
    ``continues``.

    Args:
        documents: examples as :class:`PackingCollator` takes them, by position.
    """

    def __init__(self, documents: Any) -> None:
        self.documents = documents

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, piece: Piece) -> dict[str, Any]:
        example = self.documents[piece.document]
        return {name: part[piece.start : piece.stop] for name, part in example.items()} | {CONTINUES: piece.continues}


def carried(states: Tensor | None, continues: Tensor) -> Tensor | None:
    """The initial states of a batch's pieces: those that the pieces before them ended in, zero for others.

    Args:
        states: ``(N, ...)``, final states of the batch before, detached if no gradient is to go further back; None
            before the first batch.
        continues: ``(M,)``, int64, of :class:`PackingCollator`.

    Returns:
        ``(M, ...)``, ``initial_state`` of the same op on this batch; None if ``states`` is.
    """
    if states is None:
        return None
    there = continues.ge(0).view(-1, *[1] * (states.ndim - 1))
    return states.index_select(0, continues.clamp(min=0)).where(there, 0)
