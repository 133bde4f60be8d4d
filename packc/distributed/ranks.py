"""The ranks that a plan is made for: their group, the device of its collectives, and whether they agree."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist


def group_of(mesh_or_group: Any) -> dist.ProcessGroup:
    """A group that this rank is in.

    Raises:
        TypeError, ValueError, RuntimeError: there is none.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("plan: call torch.distributed.init_process_group first")
    if mesh_or_group == dist.GroupMember.NON_GROUP_MEMBER or mesh_or_group is None:
        raise ValueError(f"plan: rank {dist.get_rank()} is not in the group {mesh_or_group}")
    if isinstance(mesh_or_group, dist.ProcessGroup):
        group = mesh_or_group
    elif hasattr(mesh_or_group, "get_group"):
        if mesh_or_group.ndim != 1:
            raise ValueError(
                f"plan: a mesh must have one dimension, not {tuple(mesh_or_group.shape)}: "
                'take one of it, as in mesh["sequence"]'
            )
        group = mesh_or_group.get_group()
    else:
        raise TypeError(f"plan: neither a DeviceMesh nor a process group: {mesh_or_group!r}")
    if group.rank() < 0:
        raise ValueError(f"plan: rank {dist.get_rank()} is not in the group {dist.get_process_group_ranks(group)}")
    return group


def device_of(group: dist.ProcessGroup) -> torch.device:
    """On which its collectives are."""
    if "nccl" in dist.get_backend(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def check_that_all_agree(group: dist.ProcessGroup, what: str, text: str) -> None:
    """Raises the same error on every rank unless ``text`` is equal on all. A collective of 8 bytes a rank."""
    digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)
    mine = torch.tensor([digest], device=device_of(group))
    found = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(found, mine, group=group)
    digests = [int(each) for each in found]
    if len(set(digests)) > 1:
        others = [rank for rank, each in enumerate(digests) if each != digests[0]]
        raise ValueError(f"{what} differ between ranks: {others} have not what rank 0 has")
