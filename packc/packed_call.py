"""A compiled packed graph, callable with the padded graph's inputs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from packc import config
from packc.batches import Packing, pack_batch, unread_batch
from packc.boundaries import BoundaryInput, Given, handed_over, say_something
from packc.compilation import in_backward
from packc.fake_tensors import has_values
from packc.passes import Requirements

log = logging.getLogger(__name__)


class NotPacked(RuntimeError):
    """Documents within rows cannot be kept apart; or, under ``packc.strict``, a graph or a batch cannot be packed
    exactly. The message says why."""


_LOSS_OUTSIDE = (
    "packc returns zero before a left-padded row's first token. A loss of what the compiled graph returns in which that"
    " token's label counts differs from stock's: set packc.loss_outside, pad on the right, or pass the labels to the"
    " model. Where it does not count, all is well."
)
_ACROSS = (
    "a label counts at the last token of a document, of which the next token is another document's: set the labels of"
    " every document's first token to the loss's ignore_index"
)
_RECOMPUTED = (
    "recomputed in a backward outside of the packc.documents block that its forward was in: run the backward in a block"
    " of the same documents"
)


class _Call:
    """What packed and unpacked calls share: the boundaries that a batch comes with."""

    def __init__(self, boundaries: Sequence[BoundaryInput]) -> None:
        self.boundaries = boundaries
        self._was_in_block = False
        self._warned: set[str] = set()

    def given(self, inputs: Sequence[Any]) -> list[Given]:
        """The boundaries of this call.

        Raises:
            NotPacked: those of the forward are not known any more.
        """
        around = handed_over()
        if around is None and self._was_in_block and in_backward():
            raise NotPacked(_RECOMPUTED)
        self._was_in_block |= around is not None
        found = [each.given(inputs) for each in self.boundaries]
        return found if around is None else [around, *found]


class PackedCall(_Call):
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
        with_padding: tuple[Callable[..., Any], Requirements] | None = None,
        boundaries: Sequence[BoundaryInput] = (),
        loss_outside: bool = False,
    ) -> None:
        of_others = [each for each in boundaries if not each.is_of(requirements.mask_path)]
        self.of_others = of_others if requirements.padded_mixers else []
        super().__init__([each for each in boundaries if each not in self.of_others])
        self.of_all = any(each.is_of_all for each in self.boundaries)
        self.compiled = compiled
        self.with_padding = with_padding
        self.graph = graph
        self.loss_outside = loss_outside
        self.labels_may_follow = requirements.returns_tokens and not requirements.labels
        self.requirements = requirements
        self.strict = strict
        self.last: Packing | None = None

    def __call__(self, *inputs: Any) -> Any:
        wanted = self.requirements
        if not has_values(inputs[wanted.mask]):
            self.last = packing = unread_batch(inputs[wanted.mask])
            return self.graph(*inputs, packing.index, packing.cu_seqlens)
        packing = self._packing(inputs)
        compiled = self._compiled(packing)
        for reason in packing.reasons:
            self._say(reason, packing)
        self.last = packing
        outputs = compiled(*inputs, packing.index, packing.cu_seqlens)
        if packing.left_padded and self.labels_may_follow and not self.loss_outside and _trains(outputs):
            # Not under strict either: nothing says that there is such a loss.
            say_once(_LOSS_OUTSIDE, self._warned, strict=False)
        return outputs

    def _packing(self, inputs: Sequence[Any]) -> Packing:
        wanted = self.requirements
        if say_something([each.given(inputs) for each in self.of_others]):
            raise NotPacked(f"documents of another sequence than {wanted.mask_path}'s: {wanted.padded_mixers[0]}")
        with torch.no_grad():
            labels = [(each.graph(*inputs), each.ignore_index) for each in (*wanted.labels, *wanted.live)]
        rows = inputs[wanted.mask]
        return pack_batch(
            rows if wanted.padding else torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device),
            labels if wanted.padding else [],
            inside=[inputs[each] for each in wanted.other_masks],
            outside=wanted.outside,
            boundaries=self.given(inputs),
            moved=[given for given, each in zip(labels, wanted.labels, strict=False) if each.moved],
            one_before=self.loss_outside and self.labels_may_follow,
            padding_attends=wanted.attends,
            keep_left=wanted.keep_left,
            keep_right=wanted.keep_right,
        )

    def _compiled(self, packing: Packing) -> Callable[..., Any]:
        """The graph that is right for a batch.

        Raises:
            NotPacked: none is, as a row holds several documents.
        """
        compiled, wanted = self.compiled, self.requirements
        if self.with_padding and (not packing.only_tokens or (packing.gaps and wanted.reads_positions)):
            compiled, wanted = self.with_padding
        if packing.several:
            if wanted.padded_mixers and (self.of_all or handed_over() is not None):
                raise NotPacked(f"documents of several sequences, one of which runs padded: {wanted.padded_mixers[0]}")
            reason = wanted.one_document if packing.elsewhere else wanted.one_document_of_positions
            if reason is not None:
                raise NotPacked(f"packc cannot keep several documents in a row apart: {reason}")
        if packing.across:
            raise NotPacked(_ACROSS)
        return compiled

    def _say(self, reason: str, packing: Packing) -> None:
        text = f"packc left {packing.whole_rows} of {packing.rows} rows padded: {reason}"
        say_once(text, self._warned, key=reason, strict=self.strict)


def _trains(outputs: Sequence[Any]) -> bool:
    return any(isinstance(each, Tensor) and each.requires_grad for each in outputs)


class UnpackedCall(_Call):
    """A compiled graph that is not packed, and what is to be done where a batch comes with boundaries.

    Args:
        for_documents: the graph packed with every position a token, if it could be.
        reason: why it is not packed, or not for documents.
        has_tokens: whether any input could be rows of tokens.
        has_mixers: whether it has ops of packc's to which rows are documents. Without, ``boundaries`` are the model's
            own business, whose attention may have a mask made of them.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        for_documents: Callable[..., Any] | None,
        *,
        boundaries: Sequence[BoundaryInput],
        reason: str,
        has_tokens: bool,
        has_mixers: bool,
    ) -> None:
        super().__init__(boundaries)
        self.compiled, self.for_documents, self.reason = compiled, for_documents, reason
        self.has_tokens, self.has_mixers = has_tokens, has_mixers

    def __call__(self, *inputs: Any) -> Any:
        given = self.given(inputs)
        if given and self.has_tokens and say_something(given):
            if self.for_documents is not None:
                return self.for_documents(*inputs)
            around = any(each.around for each in given)
            names = " and ".join(each.name for each in given)
            text = f"packc cannot keep the documents that {names} begin{'s' * (len(given) == 1)} apart: {self.reason}"
            if around or self.has_mixers:
                raise NotPacked(text)
            say_once(f"{text}. Whether they are is up to the model's attention masks", self._warned)
        return self.compiled(*inputs)


def say_once(text: str, said: set[str], *, key: str | None = None, strict: bool | None = None) -> None:
    """Warn, unless ``key`` (the text) was said before; under strict, raise :class:`NotPacked`."""
    if config.strict if strict is None else strict:
        raise NotPacked(text)
    if (key or text) not in said:
        said.add(key or text)
        warnings.warn(text, stacklevel=3)
