"""Which documents go into one batch: first-fit-decreasing within a window of a shuffled data set, for every rank."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from packc.data.bins import first_fit_decreasing

_COSTS = {"tokens": lambda length: length, "attention": lambda length: length * length}
_CARRIED = 0.99
"""A bin less full than this is packed anew with the next window."""


@dataclass
class _Place:
    """How far an epoch has come."""

    epoch: int = 0
    read: int = 0
    """Documents of the shuffled data set before the window."""
    carried: list[int] = field(default_factory=list)
    """Documents left over by the windows before it."""
    steps: int = 0
    """Steps taken of the window."""


class PackingBatchSampler:
    """Batches of documents with at most ``budget`` tokens each, nearly all of them full.

    A ``batch_sampler`` of :class:`torch.utils.data.DataLoader`: iterating gives lists of positions in the data set, of
    one rank. Every rank takes the same number of steps, each document comes once an epoch on one of them, and the
    ranks' batches of one step are of like cost. All ranks compute the same plan from the same arguments.

    Deterministic given ``seed``; every epoch has an order of its own. :meth:`state_dict` says where it is after
    the last batch that was asked for, and costs no more than the documents left over; after
    :meth:`load_state_dict` the next iteration goes on from there. A ``DataLoader`` with workers asks for batches ahead
    of training: keep the state of a loader that counts them (``torchdata``'s ``StatefulDataLoader``).

    Args:
        lengths: tokens of each document, from 1 to ``budget``: cut longer ones first, here and in the collator
            (``lengths.clamp(max=budget)``, ``PackingCollator(max_length=budget)``).
        budget: tokens of a batch.
        window: documents that are packed together. A larger one wastes less, and mixes lengths over more steps.
        shuffle: whether the data set is read in another order each epoch.
        seed: of these orders.
        rank, world_size: of the data-parallel ranks; those of ``torch.distributed`` where it is initialised.
        balance: what the ranks' batches of a step are alike in: ``"tokens"``, or ``"attention"``, the sum of the
            squares of lengths, which is what attention costs.
        drop_last: leave out the epoch's last documents where they do not fill a batch of every rank. Otherwise they are
            dealt out to all, and where they are fewer than ranks, some come twice.

    Raises:
        ValueError: a length is not from 1 to ``budget``; there are no documents; or another argument is out of range.
    """

    def __init__(
        self,
        lengths: Sequence[int] | Tensor,
        budget: int,
        *,
        window: int = 8192,
        shuffle: bool = True,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        balance: str = "tokens",
        drop_last: bool = False,
    ) -> None:
        self.lengths: list[int] = lengths.tolist() if isinstance(lengths, Tensor) else list(lengths)
        if not self.lengths:
            raise ValueError("lengths: there are no documents")
        beyond = next((n for n, length in enumerate(self.lengths) if not 1 <= length <= budget), None)
        if beyond is not None:
            raise ValueError(
                f"lengths[{beyond}] is {self.lengths[beyond]}, not from 1 to the budget of {budget} tokens"
            )
        if balance not in _COSTS:
            raise ValueError(f"balance must be one of {sorted(_COSTS)}, not {balance!r}")
        if window < 1:
            raise ValueError(f"window must be 1 or more, not {window}")
        self.rank, self.world_size = ranks_of(rank, world_size)
        self.budget, self.window, self.shuffle, self.seed = budget, window, shuffle, seed
        self.balance, self.drop_last = balance, drop_last
        self._place, self._resumes = _Place(), False
        self._count: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps():
            yield step[self.rank]

    def steps(self) -> Iterator[list[list[int]]]:
        """The batches of all ranks, step by step: of a whole epoch, or what a loaded state leaves of it."""
        if not self._resumes:
            self._place = _Place(self._place.epoch)
        self._resumes = False
        order = self._order(self._place.epoch)
        while True:
            place = self._place
            end = min(place.read + self.window, len(order))
            documents = [*place.carried, *order[place.read : end]]
            steps, carried = self._window(documents, last=end == len(order), draw=(place.epoch, place.read))
            for step in steps[place.steps :]:
                place.steps += 1
                yield step
            if end == len(order):
                break
            self._place = _Place(place.epoch, end, carried)
        self._place = _Place(place.epoch + 1)

    def __len__(self) -> int:
        """Steps of this epoch, whose plan it makes: 1M documents take seconds."""
        epoch = self._place.epoch
        if self._count is None or self._count[0] != epoch:
            copy = PackingBatchSampler.__new__(PackingBatchSampler)
            copy.__dict__.update(self.__dict__, _place=_Place(epoch), _resumes=False)
            self._count = epoch, sum(1 for _ in copy.steps())
        return self._count[1]

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration is of; one that ran to its end is followed by the next without."""
        if epoch != self._place.epoch:
            self._place, self._resumes = _Place(epoch), False

    def state_dict(self) -> dict[str, Any]:
        """Where it is; of plain numbers and lists."""
        return {"plan": self._plan(), "place": asdict(self._place)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: the state is that of a sampler with other arguments.
        """
        plan = self._plan()
        other = {name: value for name, value in state["plan"].items() if plan.get(name) != value}
        if other:
            raise ValueError(f"the state is that of another sampler: it had {other}, this one has {plan}")
        self._place, self._resumes = _Place(**state["place"]), True

    def _plan(self) -> dict[str, Any]:
        names = ("budget", "window", "shuffle", "seed", "world_size", "balance", "drop_last")
        return {"documents": len(self.lengths), "tokens": sum(self.lengths), **{n: getattr(self, n) for n in names}}

    def _order(self, epoch: int) -> Sequence[int]:
        if not self.shuffle:
            return range(len(self.lengths))
        return torch.randperm(len(self.lengths), generator=_generator(self.seed, epoch)).tolist()

    def _window(
        self, documents: list[int], *, last: bool, draw: tuple[int, int]
    ) -> tuple[list[list[list[int]]], list[int]]:
        """The steps of a window, and the documents left over."""
        lengths = [self.lengths[each] for each in documents]
        bins = first_fit_decreasing(lengths, self.budget)
        bins.sort(key=lambda items: sum(lengths[item] for item in items), reverse=True)
        full = sum(sum(lengths[item] for item in items) >= _CARRIED * self.budget for items in bins)
        left = sum(map(len, bins[full:]))
        while left > self.window // 2:  # at most half a window is left over, so that every window moves on
            left -= len(bins[full])
            full += 1
        taken = len(bins) if last else full
        taken -= taken % self.world_size
        batches, rest = bins[:taken], bins[taken:]
        if last and rest and not self.drop_last:
            batches, rest = batches + _parted(rest, self.world_size), []
        cost = _COSTS[self.balance]
        batches.sort(key=lambda items: sum(cost(lengths[item]) for item in items))
        found = [[documents[item] for item in items] for items in batches]
        steps = [found[n : n + self.world_size] for n in range(0, len(found), self.world_size)]
        if self.shuffle:
            order = torch.randperm(len(steps), generator=_generator(self.seed, *draw)).tolist()
            steps = [steps[n] for n in order]
        return steps, [documents[item] for items in rest for item in items]


def _parted(bins: list[list[int]], ranks: int) -> list[list[int]]:
    """Bins parted until there is one for every rank; where there are fewer items than that, some come twice."""
    bins, items = list(bins), [item for each in bins for item in each]
    while len(bins) < min(ranks, len(items)):
        most = max(range(len(bins)), key=lambda n: len(bins[n]))
        bins[most : most + 1] = bins[most][::2], bins[most][1::2]
    return bins + [[items[n % len(items)]] for n in range(ranks - len(bins))]


def _generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(random.Random(str(numbers)).randrange(2**63))


def ranks_of(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        raise ValueError("rank and world_size go together")
    if rank is None or world_size is None:
        there = torch.distributed.is_available() and torch.distributed.is_initialized()
        return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if there else (0, 1)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be from 0 to world_size - 1 = {world_size - 1}, not {rank}")
    return rank, world_size
