"""Which exchange is the quickest, by a model of the network: a start, a hop and a bandwidth.

A step of an exchange takes ``start + hop + bytes / bandwidth``; of a gather, which is one collective, the W - 1 hops
follow one another without a start. What a rank computes on the way is small and left out. Numbers are those of GPUs in
one node or on a good network; the choice is about orders of magnitude.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from packc.distributed.routing import steps


class Network(NamedTuple):
    start: float = 30e-6
    """Seconds from one collective to the next that depends on it, small kernels in between included."""
    hop: float = 5e-6
    """Seconds that a byte takes from rank to rank."""
    bandwidth: float = 25e9
    """Bytes a second, of one rank."""


class Traffic(NamedTuple):
    """Of one rank and one op."""

    forward: int
    """Bytes received."""
    backward: int
    starts: int
    """Collectives that wait for one another, each way."""
    hops: int
    """Each way."""

    def seconds(self, network: Network) -> float:
        return 2 * (self.starts * network.start + self.hops * network.hop) + sum(self[:2]) / network.bandwidth


def traffic(exchange: str, size: int, transition: int, state: int) -> Traffic:
    """Over ``size`` ranks, for bytes of a transition and of a state. Of the rank that receives the most."""
    both = transition + state
    formulas: dict[str, Callable[[], Traffic]] = {
        "all_gather": lambda: Traffic((size - 1) * both, (size - 1) * state, 1, size - 1),
        # A rank waits for a chain of the length of the group, but receives once.
        "ring": lambda: Traffic(state, state, size - 1, size - 1),
        "doubling": lambda: Traffic(len(steps(size)) * both, len(steps(size)) * both, *2 * [len(steps(size))]),
        "neighbour": lambda: Traffic(state, state, 1, 1),
    }
    return formulas[exchange]()


def quickest(size: int, transition: int, state: int, near: bool, network: Network | None = None) -> str:
    """Of the exchanges that serve a plan; ``near``: no document spans more than two ranks."""
    network = network or Network()

    def seconds(exchange: str) -> float:
        found = traffic(exchange, size, transition, state)
        # The bytes of a chain are on the way one rank after the other.
        chained = (size - 2) * sum(found[:2]) / network.bandwidth if exchange == "ring" else 0
        return found.seconds(network) + chained

    # Of two ranks, some are alike: then the first, which is the one with the least to compute.
    exchanges = (("neighbour",) if near else ()) + ("all_gather", "doubling", "ring")
    return min(exchanges, key=seconds)
