"""Process groups under names that are equal on all of their ranks, so that one graph serves every rank.

torch names a group by a number that differs from rank to rank, and a collective of a part of the ranks would bring
ranks into the graph. Here every rank has a group under the same names: of the sequence group ``name``

- ``name`` itself;
- ``name/right/d/c``, in which the first rank is the source of what goes ``d`` ranks to the right: of the pairs (r, r+d)
  those of colour c, which have no rank in common (``c = r // d % 2``). A rank without a partner is alone in it;
- ``name/chain-right/k``, the pair (k, k+1), and every other rank alone;

and the same to the left. A broadcast from the first rank of such a group moves a tensor from one rank to one other, or
nothing at all.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from packc.distributed.routing import steps
from packc.private_torch import private_torch

_names: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
_taken = 0  # numbers of names, those of groups that are no more too
_connected: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()


def join(group: dist.ProcessGroup, device: torch.device) -> str:
    """The name under which ``group`` is known, from now on, on each of its ranks.

    All of them call it; the first time, they agree on one that is free on all.
    """
    global _taken
    if group not in _names:
        free = torch.tensor([_taken], device=device)
        dist.all_reduce(free, dist.ReduceOp.MAX, group=group)
        _taken = int(free) + 1
        _names[group] = f"packc.sequence.{int(free)}"
        _register(_names[group], group)
    return _names[group]


def of_name(name: Any) -> dist.ProcessGroup:
    with private_torch():
        from torch._C._distributed_c10d import _resolve_process_group
    return _resolve_process_group(name)


def _register(name: Any, group: dist.ProcessGroup) -> None:
    with private_torch():
        from torch._C._distributed_c10d import _register_process_group
    _register_process_group(name, group)


def colours(size: int, distance: int) -> list[int]:
    """Of the pairs of ranks at a distance: those that there are."""
    return sorted({left // distance % 2 for left in range(size - distance)})


def connect(group: dist.ProcessGroup, exchange: str) -> None:
    """Makes the groups of pairs that an exchange needs: to be called on all ranks of ``group``, for which it waits."""
    distances = {"all_gather": [], "ring": [1], "neighbour": [1]}.get(exchange, steps(group.size()))
    done = _connected.setdefault(group, set())
    for distance in distances:
        if f"pairs {distance}" not in done:
            done.add(f"pairs {distance}")
            _connect_pairs(group, distance)


def _connect_pairs(group: dist.ProcessGroup, distance: int) -> None:
    name, size, rank = _names[group], group.size(), group.rank()
    for direction in ("right", "left"):
        alone = _make(group, [rank], f"{direction}/{distance}")
        # In the order of pairs, which is the same for both ranks of each: nobody waits in a circle.
        pairs = {
            left: _make(group, [left, left + distance][:: 1 if direction == "right" else -1], f"{distance}")
            for left in range(size - distance)
            if rank in (left, left + distance)
        }
        for colour in colours(size, distance):
            mine = [pair for left, pair in pairs.items() if left // distance % 2 == colour]
            _register(f"{name}/{direction}/{distance}/{colour}", mine[0] if mine else alone)
        if distance == 1:
            for left in range(size - 1):
                _register(f"{name}/chain-{direction}/{left}", pairs.get(left, alone))


def _make(group: dist.ProcessGroup, ranks: list[int], purpose: str) -> dist.ProcessGroup:
    """Of ranks of ``group``, in this order."""
    with private_torch():
        # new_group sorts ranks, or waits for ranks that are in no pair.
        from torch.distributed.distributed_c10d import _new_process_group_helper, _world

        default: Any = dist.group.WORLD
        _, store = _world.pg_map[default]
    globally = [dist.get_global_rank(group, rank) for rank in ranks]
    name: Any = f"packc/{group.group_name}/{purpose}/{'-'.join(map(str, globally))}"
    with _unbound(default):
        pair, _ = _new_process_group_helper(
            len(ranks),
            ranks.index(group.rank()),
            globally,
            dist.get_backend_config(group),
            store,
            group_name=name,
            timeout=_timeout(group),
            group_desc="packc: a pair of a sequence group",
        )
    _world.pg_group_ranks[pair] = {rank: place for place, rank in enumerate(globally)}
    return pair


@contextlib.contextmanager
def _unbound(default: Any) -> Iterator[None]:
    """Without the device that ``init_process_group(device_id=...)`` gave: of a group with one, NCCL splits smaller ones
    off, for which all of its ranks must call; a pair's ranks do."""
    device, default.bound_device_id = default.bound_device_id, None
    try:
        yield
    finally:
        default.bound_device_id = device


def _timeout(group: dist.ProcessGroup) -> Any:
    with private_torch():
        return group._get_backend(group._device_types[0]).options._timeout
