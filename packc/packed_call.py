"""A compiled packed graph, callable with the padded graph's inputs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from packc.batches import Packing, pack_batch, unread_batch
from packc.passes import Packed

log = logging.getLogger(__name__)


class NotPacked(RuntimeError):
    """Under ``packc.strict``: a graph or a batch cannot be packed exactly. The message says why."""


class PackedCall:
    """Packs each batch and runs the compiled graph on it.

    Rows that packing could change run whole in the same compiled graph: they are documents with nothing left out.

    On fake and meta tensors (estimators of FLOPs and memory) the packed graph runs op by op, with every position a
    token: there is no mask to read, and generated code would not know fakes from tensors.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        graph: fx.GraphModule,
        requirements: Packed,
        *,
        strict: bool | None,
        positions: int | None = None,
    ) -> None:
        self.compiled = compiled
        self.graph = graph
        self.positions = positions
        self.requirements = requirements
        self.strict = strict
        self.last: Packing | None = None
        self._warned: set[str] = set()

    def __call__(self, *inputs: Any) -> Any:
        wanted = self.requirements
        if _without_values(inputs):
            self.last = packing = unread_batch(inputs[wanted.mask])
            return self.graph(*inputs, packing.index, packing.cu_seqlens)
        with torch.no_grad():
            labels = [(each.graph(*inputs), each.ignore_index) for each in wanted.labels]
        packing = pack_batch(
            inputs[wanted.mask],
            labels,
            inside=[inputs[each] for each in wanted.other_masks],
            outside=wanted.outside,
            positions=None if self.positions is None else inputs[self.positions],
            keep_left=wanted.keep_left,
            keep_right=wanted.keep_right,
        )
        for reason in packing.reasons:
            self._say(reason, packing)
        self.last = packing
        return self.compiled(*inputs, packing.index, packing.cu_seqlens)

    def _say(self, reason: str, packing: Packing) -> None:
        text = f"packc left {packing.whole_rows} of {len(packing.cu_seqlens) - 1} rows padded: {reason}"
