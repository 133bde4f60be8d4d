"""How states and their gradients travel along the ranks of a group: four ways, all of which give the same.

Every rank has a transition T and a state S of its last segment; the state that leaves rank q is::

    out[q] = S[q]                         where a document begins in q (RESET)
    out[q] = T[q] out[q-1] + S[q]         otherwise

and the state that enters rank r is ``out[r-1]``. An empty rank passes on what it gets. Gradients go the other way, with
the transposes of T, and S the gradient of the state that enters the first segment from that segment alone. Where no
document enters, what comes out is of another document, and not to be used.

Documents are kept apart by selection. Collectives are functional, and no rank is a number in them (``groups.py``). Of P
numbers a transition and S a state, a rank receives (``cost.py``):

=============  ==================  =================  =======================
exchange       forward             backward           one after the other
=============  ==================  =================  =======================
all_gather     (W - 1) (P + S)     (W - 1) S          1
ring           S                   S                  W - 1
doubling       log2(W) (P + S)     log2(W) (P + S)    log2(W), rounded up
neighbour      S                   S                  1
=============  ==================  =================  =======================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from packc.distributed import groups
from packc.distributed.plans import Rank
from packc.distributed.routing import steps

_collectives = torch.ops._c10d_functional


class Sent(NamedTuple):
    entering: Tensor
    """What came, of the shape of a state."""
    transitions: Tensor
    """For the way back."""


@dataclass(frozen=True, eq=False)
class Line:
    """The ranks of a plan, in one direction."""

    ranks: Tensor
    """Of the plan."""
    size: int
    group: str
    through: Callable[[Tensor, Tensor], Tensor]
    """Of a transition, in this direction."""
    compose: Callable[[Tensor, Tensor], Tensor]
    """Of the transitions of two neighbouring segments, the left one first."""
    fold: Callable[..., Any]
    """Of all ranks' transitions and states, of who is upstream and of where documents end: ``packc::<name>_fold`` to
    the right, ``_fold_adjoint`` to the left."""
    to_right: bool
    meanwhile: Callable[[], Any]
    """Called before anything is waited for, after the first collective has begun. More than once."""

    def send(self, exchange: str, transition: Tensor, state: Tensor, transitions: Tensor | None = None) -> Sent:
        """By the exchange of a name. ``transitions``: those that the same exchange gave in the other direction."""
        if state.numel() == 0:
            return Sent(state, transition)
        if exchange == "neighbour":
            return Sent(self.neighbour(state), transition)
        if exchange != "all_gather":
            return Sent(getattr(self, exchange)(transition, state), transition)
        if transitions is not None:
            return Sent(self.all_gather_states(transitions, state), transitions)
        return Sent(*self.all_gather(transition, state))

    # ---- the ways ----------------------------------------------------------------------------------------------------

    def all_gather(self, transition: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """What enters, and the transitions of all ranks ``(W, ...)``, for :meth:`all_gather_states` on the way back."""
        transitions, states = _unflat(self._gathered(_flat(transition, state)), transition, state)
        entering, kept = self.fold(transitions, states, *self._marks())
        return entering, kept

    def all_gather_states(self, transitions: Tensor, state: Tensor) -> Tensor:
        states = self._gathered(state.reshape(-1)).view(-1, *state.shape[1:])
        entering: Tensor = self.fold(transitions, states, *self._marks())
        return entering

    def _marks(self) -> tuple[Tensor, Tensor]:
        return self._row(Rank.BEFORE, Rank.AFTER), self._row(Rank.RESET, Rank.STOP)

    def ring(self, transition: Tensor, state: Tensor) -> Tensor:
        mine, entering = self.ranks[Rank.SELF], torch.zeros_like(state)
        order = self._order()
        for source, target in pairwise(order):
            leaving = self._passed(transition, state, entering)
            came = self._broadcast(leaving, f"chain-{self._direction()}/{min(source, target)}")
            entering = torch.where(mine[target], came, entering)
        return entering

    def doubling(self, transition: Tensor, state: Tensor) -> Tensor:
        """After the step of distance d: of the d ranks before this one, and of the d ranks up to this one."""
        keeps = self._row(Rank.KEEP_RIGHT, Rank.KEEP_LEFT)
        distances, moving, before = steps(self.size), _flat(transition, state), None
        for step, distance in enumerate(distances):
            came = _unflat(self._shift(moving, step, distance), transition, state)
            if before is None:
                before = came[0], torch.where(keeps[step], 0, came[1])
            else:
                reached = self.through(before[0], came[1]) + before[1]
                before = self._join(came[0], before[0]), torch.where(keeps[step], before[1], reached)
            if distance is not distances[-1]:
                whole = self._join(before[0], transition)
                moving = _flat(whole, self._passed(transition, state, before[1]))
        assert before is not None
        return before[1]

    def neighbour(self, state: Tensor) -> Tensor:
        """Where none of what enters comes from farther away."""
        return self._shift(state, 0, 1)

    # ---- steps -------------------------------------------------------------------------------------------------------

    def _passed(self, transition: Tensor, state: Tensor, entering: Tensor) -> Tensor:
        """What leaves this rank."""
        ends = (self._row(Rank.RESET, Rank.STOP) & self.ranks[Rank.SELF]).any()
        return torch.where(ends, state, self.through(transition, entering) + state)

    def _join(self, upstream: Tensor, downstream: Tensor) -> Tensor:
        return self.compose(upstream, downstream) if self.to_right else self.compose(downstream, upstream)

    def _shift(self, x: Tensor, step: int, distance: int) -> Tensor:
        """What the rank ``distance`` upstream has; anything where there is none."""
        colours = groups.colours(self.size, distance)
        came = [self._start(x, f"{self._direction()}/{distance}/{colour}") for colour in colours]
        waited = [self._wait(each) for each in came]
        if len(waited) == 1:
            return waited[0]
        return torch.where(self._row(Rank.COLOUR_RIGHT, Rank.COLOUR_LEFT)[step], waited[1], waited[0])

    def _broadcast(self, x: Tensor, name: str) -> Tensor:
        return self._wait(self._start(x, name))

    def _start(self, x: Tensor, name: str) -> Tensor:
        return _collectives.broadcast.default(x.contiguous(), 0, f"{self.group}/{name}")

    def _gathered(self, x: Tensor) -> Tensor:
        found = _collectives.all_gather_into_tensor.default(x, self.size, self.group)
        return self._wait(found).view(self.size, -1)

    def _wait(self, started: Tensor) -> Tensor:
        self.meanwhile()
        return _collectives.wait_tensor.default(started)

    def _row(self, to_right: Rank, to_left: Rank) -> Tensor:
        return self.ranks[to_right if self.to_right else to_left]

    def _order(self) -> range:
        return range(self.size) if self.to_right else range(self.size - 1, -1, -1)

    def _direction(self) -> str:
        return "right" if self.to_right else "left"


def _flat(transition: Tensor, state: Tensor) -> Tensor:
    return torch.cat([transition.reshape(-1), state.reshape(-1)])


def _unflat(x: Tensor, transition: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Of one rank, or of as many as there are rows."""
    rows = x if x.ndim == 2 else x.unsqueeze(0)
    of_transition, of_state = rows.split([transition.numel(), state.numel()], 1)
    return of_transition.reshape(-1, *transition.shape[1:]), of_state.reshape(-1, *state.shape[1:])
