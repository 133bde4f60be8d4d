"""What an op knows of a plan: ``packc.distributed.plan`` makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from packc.ops.mixer import Mixer


class Plan(Protocol):
    """Of a packed stream that is cut over ranks. An op with ``plan=`` takes this rank's shard, ``(1, T_r, ...)``.

    Its results are those of the whole stream at these tokens. ``initial_state`` is that of all documents of the stream,
    on all ranks; ``final_state`` too, with the state of a document on the rank where it ends and zeros elsewhere. Of
    ``initial_state`` and of what is not per token (weights) each rank has its share of the gradient: they sum to the
    whole. Where states travel, there is no second derivative, and no forward mode.
    """

    @property
    def offsets(self) -> Tensor:
        """Of all documents of the stream, in this shard: ``(N + 1,)``."""

    def run(
        self, mixer: Mixer, arguments: Sequence[Any], initial_state: Tensor | None, output_final_state: bool
    ) -> Any:
        """``(out, final_state)`` of the op, on this rank's shard; ``arguments`` are its tensors and options."""

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        relative_bias: Tensor | None,
        causal: bool,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """``out`` of :func:`packc.ops.varlen_attention`, on this rank's shard."""


def offsets_of(plan: Plan | None, cu_seqlens: Tensor | None) -> Tensor | None:
    """Of the documents that an op gets."""
    if plan is None:
        return cu_seqlens
    if cu_seqlens is not None:
        raise ValueError("cu_seqlens and plan: a plan has the documents, pass one of the two")
    return plan.offsets
