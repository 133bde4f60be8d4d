"""A compiled packed graph, callable with the padded graph's inputs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from packc import config, totals
from packc.batches import Packing, pack_batches, unread_batch
from packc.boundaries import BoundaryInput, Given, handed_over, of_streams, say_something
from packc.compilation import in_backward
from packc.enclosing_calls import boundaries_around, is_part_of_a_call
from packc.facts import Labelled, Rows
from packc.fake_tensors import has_values
from packc.ops import documents
from packc.passes import Labels, Requirements

log = logging.getLogger(__name__)


class NotPacked(RuntimeError):
    """Documents within rows cannot be kept apart; or, under ``packc.strict``, a graph or a batch cannot be packed
    exactly. The message says why."""


_LOSS_OUTSIDE = (
    "packc returns zero before a left-padded row's first token. A loss of what the compiled graph returns in which that"
    " token's label counts differs from stock's: set packc.loss_outside, pad on the right, or pass the labels to the"
    " model. Where it does not count, all is well, and packc.loss_outside may be False."
)
_ACROSS = (
    "a label counts at the last token of a document, of which the next token is another document's: set the labels of"
    " every document's first token to the loss's ignore_index"
)
_NO_KEYS = "a row without tokens, to which another sequence attends by a mask that is added to scores: leave it out"
_OF_WHICH = (
    "boundaries around several sequences: of which they speak is not known. Name them: "
    'packc.documents(cu_seqlens={"chosen.attention_mask": ..., "rejected.attention_mask": ...})'
)
_RECOMPUTED = (
    "recomputed in a backward, in which the documents of its forward are not known any more: put forward and backward"
    " into a packc.documents block"
)


class _Call:
    """What packed and unpacked calls share: the boundaries that a batch comes with."""

    def __init__(self, boundaries: Sequence[BoundaryInput], *, has_mixers: bool = True) -> None:
        self.boundaries = boundaries
        self.has_mixers = has_mixers
        self._was_in_block = False
        self._warned: set[str] = set()

    def around(self) -> tuple[Given, ...]:
        """What :func:`packc.documents` says of this call, or where that says nothing, the calls around it.

        Raises:
            NotPacked: what was said in the forward is not known any more.
        """
        around = handed_over() or self._given_to_calls_around()
        if not around and self._was_in_block and in_backward():
            raise NotPacked(_RECOMPUTED)
        self._was_in_block |= bool(around)
        return around

    def _given_to_calls_around(self) -> tuple[Given, ...]:
        if not self.has_mixers:
            return ()
        own = {each.name for each in self.boundaries}
        found = [Given(name, value, around=True) for name, value in boundaries_around().items() if name not in own]
        return tuple(each for each in found if say_something([each]))


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
        streams: Sequence[Requirements],
        *,
        strict: bool | None,
        with_padding: tuple[Callable[..., Any], Sequence[Requirements]] | None = None,
        boundaries: Sequence[BoundaryInput] = (),
        loss_outside: bool | None = None,
    ) -> None:
        super().__init__(boundaries)
        self.compiled = compiled
        self.with_padding = with_padding
        self.graph = graph
        self.loss_outside = loss_outside
        """Whether labels may count on what the graph returns: somebody says so, or the first call is a block's."""
        self._asks_for_loss_outside = loss_outside is None
        self.streams = streams
        self.padded_mixers = streams[-1].padded_mixers
        """Of no stream."""
        self.strict = strict
        self.last: list[Packing] = []
        self._of_stream = [[each for each in boundaries if each.is_of(stream.mask_path)] for stream in streams]
        of_none = [each for each in boundaries if not any(each in own for own in self._of_stream)]
        self._of_others = of_none if self.padded_mixers else []
        if not self.padded_mixers and len(streams) == 1:
            self._of_stream = [list(boundaries)]

    def __call__(self, *inputs: Any) -> Any:
        if not has_values(inputs[self.streams[0].mask]):
            self.last = [unread_batch(inputs[stream.mask]) for stream in self.streams]
            return self.graph(*inputs, *_index(self.last))
        if self.loss_outside is None:  # not without gradients: a model that generates calls itself
            self.loss_outside = torch.is_grad_enabled() and is_part_of_a_call()
        with torch.no_grad():
            packings = pack_batches(self._rows(inputs))
        compiled = self._compiled(packings)
        for packing in packings:
            for reason in packing.reasons:
                self._say(reason, packing)
        self.last = packings
        return self._run(compiled, [*inputs, *_index(packings)])

    def _run(self, compiled: Callable[..., Any], inputs: Sequence[Any]) -> Any:
        """The compiled graph on the batch whose packing is the last one."""
        totals.count_step(self.last)
        outputs = compiled(*inputs)
        if self._asks_for_loss_outside and not self.loss_outside and _trains(outputs):
            for stream, packing in zip(self.streams, self.last, strict=True):
                if packing.left_padded and stream.labels_may_follow:
                    # Not under strict either: nothing says that there is such a loss.
                    say_once(_LOSS_OUTSIDE, self._warned, strict=False)
        return outputs

    def _rows(self, inputs: Sequence[Any]) -> list[Rows]:
        if say_something([each.given(inputs) for each in self._of_others]):
            raise NotPacked(f"documents of another sequence: {self.padded_mixers[0]}")
        around = self.around()
        if len(self.streams) > 1 and any(each.of is None for each in around):
            raise NotPacked(_OF_WHICH)
        of_stream = of_streams(around, [stream.paths for stream in self.streams])
        for own, more in zip(of_stream, self._of_stream, strict=True):
            own += [each.given(inputs) for each in more]
        return [self._rows_of(number, inputs, given) for number, given in enumerate(of_stream)]

    def _rows_of(self, number: int, inputs: Sequence[Any], given: list[Given]) -> Rows:
        wanted, rows = self.streams[number], inputs[self.streams[number].mask]
        others = [None] * (2 * number)  # what the sequences before it take
        labels = [_labelled(each, inputs, others) for each in (*wanted.labels, *wanted.live)]
        return Rows(
            rows if wanted.padding else torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device),
            labels if wanted.padding else [],
            inside=[inputs[each] for each in wanted.other_masks],
            outside=wanted.outside,
            boundaries=given,
            moved=[given for given, each in zip(labels, wanted.labels, strict=False) if each.moved],
            one_before=bool(self.loss_outside) and wanted.labels_may_follow,
            padding_attends=wanted.attends,
            keep_left=wanted.keep_left,
            keep_right=wanted.keep_right,
            keep_empty=wanted.keep_empty,
        )

    def _compiled(self, packings: Sequence[Packing]) -> Callable[..., Any]:
        """The graph that is right for a batch.

        Raises:
            NotPacked: none is, as a row holds several documents.
        """
        compiled, streams = self.compiled, self.streams
        if self.with_padding and any(map(keeps_padding, packings, streams)):
            compiled, streams = self.with_padding
        for packing, wanted, own in zip(packings, streams, self._of_stream, strict=True):
            if packing.several:
                of_all = any(each.of is None for each in self.around()) or any(each.is_of_all for each in own)
                if self.padded_mixers and of_all:
                    raise NotPacked(
                        f"documents of several sequences, one of which runs padded: {self.padded_mixers[0]}"
                    )
                reason = wanted.one_document if packing.elsewhere else wanted.one_document_of_positions
                if reason is not None:
                    raise NotPacked(f"packc cannot keep several documents in a row apart: {reason}")
            if packing.across:
                raise NotPacked(_ACROSS)
            others = [each.empty for each in packings if each is not packing]
            if wanted.refuse_empty and packing.empty - frozenset.intersection(*others or [frozenset()]):
                raise NotPacked(_NO_KEYS)
        return compiled

    def _say(self, reason: str, packing: Packing) -> None:
        text = f"packc left {packing.whole_rows} of {packing.rows} rows padded: {reason}"
        say_once(text, self._warned, key=reason, strict=self.strict)


def _labelled(labels: Labels, inputs: Sequence[Any], others: Sequence[None]) -> Labelled:
    if labels.input is not None:
        return Labelled(inputs[labels.input], labels.ignore_index, labels.ahead)
    return Labelled(labels.graph.forward(*inputs, *others), labels.ignore_index)


def _index(packings: Sequence[Packing]) -> list[Tensor]:
    return [each for packing in packings for each in (packing.index, documents.made_once(packing.cu_seqlens))]


def keeps_padding(packing: Packing, stream: Requirements) -> bool:
    """Whether packed attention would see what a mask hides."""
    return (stream.only_tokens and not packing.only_tokens) or (packing.gaps and stream.reads_positions)


def _trains(outputs: Sequence[Any]) -> bool:
    return any(isinstance(each, Tensor) and each.requires_grad for each in outputs)


class UnpackedCall(_Call):
    """A compiled graph that is not packed, and what is to be done where a batch comes with boundaries.

    Args:
        for_documents: the graph packed with every position a token, if it could be.
        reason: why it is not packed, or not for documents.
        mask: which input attention is masked by, if any.
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
        mask: int | None,
        has_tokens: bool,
        has_mixers: bool,
    ) -> None:
        super().__init__(boundaries, has_mixers=has_mixers)
        self.compiled, self.for_documents, self.reason = compiled, for_documents, reason
        self.mask, self.has_tokens = mask, has_tokens

    def __call__(self, *inputs: Any) -> Any:
        around = self.around()
        given = [*around, *(each.given(inputs) for each in self.boundaries)]
        if given and self.has_tokens and say_something(given, None if self.mask is None else inputs[self.mask]):
            if self.for_documents is not None:
                return self.for_documents(*inputs)
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
