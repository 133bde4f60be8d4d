"""The next-token loss of a stream that is cut over ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from packc.distributed.plans import Plan
from packc.distributed.shards import shard


def next_tokens(labels: Tensor, plan: Plan, ignore_index: int = -100) -> Tensor:
    """What this rank's tokens are to predict: ``(1, T_r)`` of ``labels (1, T)``, the whole stream's.

    The next token's label, if that is of the same document, wherever it was cut; ``ignore_index`` at the last token of
    each document. To be used with a loss that shifts nothing itself.
    """
    ends = torch.tensor(plan.stream[1:], device=labels.device)
    following = labels.roll(-1, 1)
    # Of an empty document at the beginning there is no token before its end.
    following[:, ends[ends > 0] - 1] = ignore_index
    return shard(following, plan)


def mean_over_ranks(total: Tensor, count: Tensor | int, plan: Plan) -> Tensor:
    """The mean over the stream of what ranks have the sums of: the same number on all ranks.

    Args:
        total: this rank's sum, ``()``, as of ``cross_entropy(..., reduction="sum")``.
        count: of how many, on this rank; maybe none. On all ranks together, at least one.

    Gradients are such that those of parameters, *averaged* over the ranks as DDP and FSDP do, are the gradient of the
    mean: each rank's is W times its share.
    """
    mine = torch.stack([total.detach().to(torch.promote_types(total.dtype, torch.float32)), _number(count, total)])
    if plan.size > 1:
        sums = torch.ops._c10d_functional.all_reduce.default(mine, "sum", plan.group)
        mine = torch.ops._c10d_functional.wait_tensor.default(sums)
    share = plan.size * total / mine[1]
    return (mine[0] / mine[1] + (share - share.detach())).to(total.dtype)


def _number(count: Tensor | int, like: Tensor) -> Tensor:
    dtype = torch.promote_types(like.dtype, torch.float32)
    return count.detach().to(dtype) if isinstance(count, Tensor) else torch.full_like(like.detach(), count, dtype=dtype)


def cross_entropy(logits: Tensor, labels: Tensor, plan: Plan, ignore_index: int = -100) -> Tensor:
    """:func:`mean_over_ranks` of ``logits (1, T_r, V)`` and ``labels (1, T_r)``, see :func:`next_tokens`."""
    total = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=ignore_index, reduction="sum"
    )
    return mean_over_ranks(total, (labels != ignore_index).sum(), plan)
