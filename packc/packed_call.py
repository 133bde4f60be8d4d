"""A compiled packed graph, callable with the padded graph's inputs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from packc import config
from packc.batches import Packing, pack_batch, unread_batch
from packc.boundaries import NOT_TAKEN, start_again
from packc.fake_tensors import has_values
from packc.passes import Requirements

log = logging.getLogger(__name__)


class NotPacked(RuntimeError):
    """Under ``packc.strict``: a graph or a batch cannot be packed exactly. The message says why."""


_LOSS_OUTSIDE = (
    "packc returns zero before a left-padded row's first token. A loss of what the compiled graph returns in which that"
    " token's label counts differs from stock's: set packc.loss_outside, pad on the right, or pass the labels to the"
    " model. Where it does not count, all is well."
)


class PackedCall:
    """Packs each batch and runs the compiled graph on it.

    Rows that packing could change run whole in the same compiled graph: they are documents with nothing left out. But
    if attention would see their padding, the batch goes through ``with_padding``, a graph in which it hides that.

    On fake and meta tensors (estimators of FLOPs and memory) the packed graph runs op by op, with every position a
    token: there is no mask to read, and generated code would not know fakes from tensors.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        graph: fx.GraphModule,
        requirements: Requirements,
        *,
        strict: bool | None,
        with_padding: Callable[..., Any] | None = None,
        positions: Sequence[int] = (),
        loss_outside: bool = False,
    ) -> None:
        self.compiled = compiled
        self.with_padding = with_padding
        self.graph = graph
        self.positions = positions
        self.loss_outside = loss_outside
        self.labels_may_follow = requirements.returns_tokens and not requirements.labels
        self.requirements = requirements
        self.strict = strict
        self.last: Packing | None = None
        self._warned: set[str] = set()

    def __call__(self, *inputs: Any) -> Any:
        wanted = self.requirements
        if not has_values(inputs[wanted.mask]):
            self.last = packing = unread_batch(inputs[wanted.mask])
            return self.graph(*inputs, packing.index, packing.cu_seqlens)
        with torch.no_grad():
            labels = [(each.graph(*inputs), each.ignore_index) for each in (*wanted.labels, *wanted.live)]
        packing = pack_batch(
            inputs[wanted.mask],
            labels,
            inside=[inputs[each] for each in wanted.other_masks],
            outside=wanted.outside,
            positions=[inputs[each] for each in self.positions],
            one_before=self.loss_outside and self.labels_may_follow,
            padding_attends=wanted.attends,
            keep_left=wanted.keep_left,
            keep_right=wanted.keep_right,
        )
        for reason in packing.reasons:
            self._say(reason, packing)
        self.last = packing
        compiled = self.compiled if packing.only_tokens or self.with_padding is None else self.with_padding
        outputs = compiled(*inputs, packing.index, packing.cu_seqlens)
        if packing.left_padded and self.labels_may_follow and not self.loss_outside and _trains(outputs):
            # Not under strict either: nothing says that there is such a loss.
            say_once(_LOSS_OUTSIDE, self._warned, strict=False)
        return outputs

    def _say(self, reason: str, packing: Packing) -> None:
        text = f"packc left {packing.whole_rows} of {len(packing.cu_seqlens) - 1} rows padded: {reason}"
        say_once(text, self._warned, key=reason, strict=self.strict)


def _trains(outputs: Sequence[Any]) -> bool:
    return any(isinstance(each, torch.Tensor) and each.requires_grad for each in outputs)


class UnpackedCall:
    """A compiled graph that is not packed, whose every batch may hand over boundaries: these are not passed over."""

    def __init__(self, compiled: Callable[..., Any], positions: Sequence[int]) -> None:
        self.compiled, self.positions = compiled, positions
        self._warned: set[str] = set()

    def __call__(self, *inputs: Any) -> Any:
        given = [] if self._warned else [inputs[each] for each in self.positions]
        if any(has_values(positions) and bool(start_again(positions).any()) for positions in given):
            say_once(f"position_ids start again within a row: {NOT_TAKEN}", self._warned)
        return self.compiled(*inputs)


def say_once(text: str, said: set[str], *, key: str | None = None, strict: bool | None = None) -> None:
    """Warn, unless ``key`` (the text) was said before; under strict, raise :class:`NotPacked`."""
    if config.strict if strict is None else strict:
        raise NotPacked(text)
    if (key or text) not in said:
        said.add(key or text)
        warnings.warn(text, stacklevel=3)
