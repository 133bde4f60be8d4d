"""What a compiled model returns of this rank's tokens alone (``packc.sequence_outputs``), and how it becomes whole."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from packc.distributed.plans import Plan


@dataclass(frozen=True, eq=False)
class Cut:
    """How the batch was cut that an output is of."""

    plan: Plan
    """Of its packed stream: for :func:`packc.distributed.cross_entropy`, and all that takes a plan."""
    index: Tensor
    """Where the stream's tokens are in the padded batch: ``b * L + l``, int64 ``(T,)``."""
    shape: tuple[int, int]
    """(B, L)"""

    def local(self, x: Tensor) -> Tensor:
        """This rank's tokens ``(1, T_r, ...)`` of a padded ``x (B, L, ...)``: labels, say, that were shifted before."""
        return x.flatten(0, 1).index_select(0, self.index[self.plan.tokens.to(self.index.device)]).unsqueeze(0)

    def padded(self, x: Tensor) -> Tensor:
        """``(B, L, ...)`` of all ranks' ``x (1, T_r, ...)``, zero at padding; on all ranks."""
        plan = self.plan
        of_all = torch.ops.packc.unshard.default(x, plan.shards.to(x.device), plan.longest, plan.size, plan.group)
        return torch.ops.packc.unpack.default(of_all, self.index, *self.shape)


_cuts = WeakIdKeyDictionary()


def note(outputs: list[Tensor], cut: Cut) -> None:
    """Remember for as long as they live how these were cut."""
    for each in outputs:
        _cuts[each] = cut


def cut_of(x: Tensor) -> Cut:
    """How the batch was cut of which a compiled model returned ``x``, with ``packc.sequence_outputs="local"``.

    Raises:
        ValueError: ``x`` is not what a model returned; what is computed of it is cut as it is.
    """
    found: Cut | None = _cuts.get(x)
    if found is None:
        raise ValueError(f"cut_of: {tuple(x.shape)} is not what a model returned of this rank's tokens; pass a plan")
    return found
