"""The ``torch.compile`` backend: packs the graph, compiles it with an inner backend, packs each batch at run time."""

from __future__ import annotations

import copy
import functools
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from packc import config, totals
from packc.boundaries import POSITIONS, boundary_inputs, handed_over, say_something
from packc.compilation import ends_in_a_graph_break
from packc.ddp import in_buckets, keeps_weights, refuse_pieces
from packc.distributed.context import of_block, only_in_this_block
from packc.garbage import sparing_old_objects
from packc.inner_backend import compiled_when_called, inner_backend
from packc.lazy_logits import with_lazy_logits
from packc.options import SequenceOptions, split_options, take_sequence
from packc.packed_call import NotPacked, PackedCall, UnpackedCall
from packc.padding import mask_input
from packc.passes import (
    Boundary,
    Graph,
    NoMask,
    NotPackable,
    Ranks,
    Tail,
    WrongMask,
    fakify,
    goes_on_from_a_cache,
    has_rows,
    index_fakes,
    is_step,
    module_of,
    split_head,
    split_products,
    told_of_documents,
    without_marks,
)
from packc.pipeline import UnknownPass, packed_graph
from packc.report import GraphReport

log = logging.getLogger(__name__)


def backend(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph on packed sequences: ``torch.compile(model, backend=packc.backend)``.

    Finds the padding mask among the graph's inputs, rewrites every op to work on real tokens only and hands the result
    to Inductor. Outputs keep size, dtype and strides (of a part of something larger, the order of axes); their padded
    positions are zero. What cannot be packed exactly runs as it was, with a log line that says why
    (``packc.config.strict`` raises instead).

    Args:
        gm: the graph that Dynamo captured.
        example_inputs: its inputs.
        mode: as for Inductor.
        options: ``"packc.<name>"`` sets :mod:`packc.config` for this model; over ``"packc.sequence"``, a process group
            or a one-dimensional ``DeviceMesh``, tokens are cut, in ways that ``"packc.sequence_outputs"`` and
            ``"packc.sequence_cuts"`` set (:func:`packc.distributed.sequence_parallel`); other keys go to Inductor.

    Raises:
        ValueError: an unknown ``packc.`` option, or a ``packc.mask`` that names no ``(B, L)`` input.
        NotPacked: under ``strict`` or with ``packc.sequence``, the graph cannot be packed; when called, the batch
            cannot; strict or not, when called with several documents in a row that cannot be kept apart.
    """
    sequence, others = take_sequence(options)
    of_model = sequence.group is not None
    sequence = sequence if of_model else of_block()
    own, inner_options = split_options(others)
    how: dict[str, Any] = {"mode": mode, "options": inner_options, "strict": own.get("strict")}
    if sequence.group is not None:
        own["strict"] = True  # ranks must not differ in what they do
        how["sequence"] = over_several_ranks(sequence)
    with config.patch(own), sparing_old_objects():
        call, _ = compile_graph(gm, example_inputs, **how)
    return call if of_model else only_in_this_block(call)


def over_several_ranks(sequence: SequenceOptions) -> SequenceOptions | None:
    """With its group; None for a group of one rank, which has all tokens."""
    from packc.distributed.ranks import group_of

    group = group_of(sequence.group)
    return sequence._replace(group=group) if group.size() > 1 else None


# Lets frontends tell packc's trace from another backend's; see packc.frontends.
backend.__packc_backend__ = True  # type: ignore[attr-defined]


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    strict: bool | None = None,
    sequence: SequenceOptions | None = None,
) -> tuple[Callable[..., Any], GraphReport]:
    """:func:`backend` under the current configuration, and a report of what it did.

    With ``sequence`` all ranks compile, and all raise where one refuses or has another graph: none is left waiting for
    the others.
    """
    compiling = _Compiling(gm, example_inputs, mode, options or {}, strict, sequence)
    if sequence is None:
        return _compiled(compiling)
    from packc.sharded_call import on_all_ranks

    return on_all_ranks(sequence.group, lambda: _compiled(compiling))


def _compiled(compiling: _Compiling) -> tuple[Callable[..., Any], GraphReport]:
    gm, example_inputs, sequence = compiling.gm, compiling.inputs, compiling.sequence
    if is_step(gm) and sequence is None:
        return compiling.step()
    try:
        refuse_pieces()
        packed = pack_graph(gm, example_inputs, for_documents=True, ranks=_ranks_of(sequence))
    except NoMask as reason:
        return compiling.unpacked(str(reason), for_documents=reason.for_documents)
    except NotPackable as reason:
        return compiling.unpacked(str(reason), reason.boundaries)
    except Exception as error:
        if config.strict or isinstance(error, (WrongMask, UnknownPass)):
            raise
        # A mistake of ours must not stop anybody's training; it must not pass unseen either.
        log.exception("a pass failed")
        warnings.warn(f"packc failed on a graph and leaves it unpacked; please report this: {error!r}", stacklevel=2)
        return compiling.unpacked(f"a pass failed: {error!r}")
    if packed.no_mask is not None and sequence is None:
        never = packed.requirements.one_document_of_positions
        if never is not None or not compiling.with_documents:
            return compiling.unpacked(packed.no_mask, for_documents=never or packed, packed=packed)
    return compiling.packed(packed)


class _Compiling:
    """A graph from Dynamo on its way to something callable, and a report of it."""

    def __init__(
        self,
        gm: fx.GraphModule,
        inputs: list[Any],
        mode: str | None,
        options: dict[str, Any],
        strict: bool | None,
        sequence: SequenceOptions | None,
    ) -> None:
        self.gm, self.inputs, self.strict, self.sequence = gm, inputs, strict, sequence
        self.compile = in_buckets(inner_backend(mode, options))
        self.compile_when_called = functools.partial(compiled_when_called, mode=mode, options=options)
        self.boundaries, self.mask = boundary_inputs(gm), mask_input(gm)

    @property
    def with_documents(self) -> bool:
        """Whether the call that is being compiled comes with boundaries."""
        given = [each.given(self.inputs) for each in self.boundaries]
        if handed_over() or any(each.name != POSITIONS for each in given):
            return True
        return say_something(given, None if self.mask is None else self.inputs[self.mask])

    def packed(self, packed: Graph) -> tuple[Callable[..., Any], GraphReport]:
        if config.strict and packed.requirements.padded_mixers:
            raise NotPacked(f"packc cannot pack all of this graph: {packed.requirements.padded_mixers[0]}")
        call = self._packed_call(packed, self.compile)
        totals.count_graph(None)
        return call, GraphReport.packed(packed.streams, call)

    def _packed_call(self, packed: Graph, compile_inner: Callable[..., Any]) -> PackedCall:
        def copied() -> fx.GraphModule:
            return module_of(packed.gm, copy.deepcopy(packed.gm.graph))  # the inner backend may write to its own

        how: dict[str, Any] = {
            "strict": self.strict,
            "boundaries": self.boundaries,
            "loss_outside": True
            if config.loss_outside is None and ends_in_a_graph_break(self.gm)
            else config.loss_outside,
        }
        if self.sequence is not None:
            from packc.sharded_call import ShardedCall, routing_fakes

            if packed.local_outputs and ends_in_a_graph_break(self.gm):
                raise NotPacked("packc.sequence_outputs: what follows a graph break wants outputs of all tokens")
            tails = self._split_head(packed.gm)
            split_products(packed.gm)
            graph = copied()  # behind that, for ranks compare what they run
            compiled = with_lazy_logits(compile_inner(packed.gm, [*self.inputs, *routing_fakes(packed)]), tails)
            how |= {"group": self.sequence.group, "local": packed.local_outputs, "work": packed.work}
            return ShardedCall(compiled, graph, packed.streams, **how)
        graph = copied()
        padded = packed.with_padding
        inputs = [*self.inputs, *packed.inputs[len(self.inputs) :], *index_fakes(packed)]
        return PackedCall(
            self._without_logits(packed.gm, lambda gm: compile_inner(gm, inputs)),
            graph,
            packed.streams,
            with_padding=None
            if padded is None
            else (self._without_logits(padded.gm, self.compile_when_called), padded.streams),
            **how,
        )

    def _without_logits(
        self, gm: fx.GraphModule, compile_it: Callable[[fx.GraphModule], Callable[..., Any]]
    ) -> Callable[..., Any]:
        tails = self._split_head(gm)
        return with_lazy_logits(compile_it(gm), tails)

    def _split_head(self, gm: fx.GraphModule) -> list[Tail]:
        # Who takes no gradients wants logits; behind a graph break, what reads them may be in another graph.
        wanted = not torch.is_grad_enabled() or ends_in_a_graph_break(self.gm)
        return split_head(gm, lazily=config.lazy_logits and not wanted and keeps_weights())

    def unpacked(
        self,
        reason: str,
        boundaries: Sequence[Boundary] = (),
        *,
        for_documents: Graph | str | None = None,
        packed: Graph | None = None,
    ) -> tuple[Callable[..., Any], GraphReport]:
        """The graph as it was; its mixers are packc's ops all the same.

        ``for_documents``: it packed without a mask, or why it could not be. ``packed``: as far as it could be.
        """
        if goes_on_from_a_cache(self.gm):
            reason = f"goes on from a cache, a static one or one used before, as no packed prompt does: {reason}"
        wanted = for_documents if isinstance(for_documents, str) and self.with_documents else reason
        if config.strict:
            raise NotPacked(f"packc cannot pack this graph: {wanted}")
        log.info("not packed: %s", reason)
        return self._left(reason, boundaries, for_documents, packed)

    def step(self) -> tuple[Callable[..., Any], GraphReport]:
        """A graph of one token a row as it was, under strict as well: nothing is lost."""
        self.boundaries = []  # such rows are one document
        return self._left("one token a row: there is nothing to pack")

    def _left(
        self,
        reason: str,
        boundaries: Sequence[Boundary] = (),
        for_documents: Graph | str | None = None,
        packed: Graph | None = None,
    ) -> tuple[Callable[..., Any], GraphReport]:
        told = told_of_documents(self.gm)
        # A convolution of the model's own is one of packc's only where the graph is packed.
        found = not told and packed is not None and any(op.startswith("packc.") for op, _ in packed.requirements.mixers)
        call = UnpackedCall(
            self.compile(without_marks(self.gm), self.inputs),
            self._packed_call(for_documents, lambda gm, _: self.compile_when_called(gm))
            if isinstance(for_documents, Graph)
            else None,
            boundaries=[] if told and all(told) else self.boundaries,
            reason=for_documents if isinstance(for_documents, str) else reason,
            mask=self.mask,
            has_tokens=has_rows(self.gm),
            has_mixers=found or not all(told),
        )
        totals.count_graph(reason)
        return call, GraphReport.unpacked(self.gm, reason, boundaries)


def pack_graph(
    gm: fx.GraphModule, example_inputs: list[Any], *, for_documents: bool = False, ranks: Ranks | None = None
) -> Graph:
    """The packed form of a Dynamo graph; with ranks, the sharded one.

    Raises:
        NoMask, NotPackable: there is none; the message says why.
    """
    packed = packed_graph(Graph(gm, fakify(gm, example_inputs), ranks=ranks), for_documents=for_documents)
    log.info("packed %d nodes into %d", len(gm.graph.nodes), len(packed.gm.graph.nodes))
    return packed


def _ranks_of(sequence: SequenceOptions | None) -> Ranks | None:
    if sequence is None:
        return None
    from packc.distributed.groups import join
    from packc.distributed.ranks import device_of

    group = sequence.group
    name = join(group, device_of(group))
    return Ranks(name, group.size(), local_outputs=sequence.outputs == "local", by_work=sequence.cuts == "work")
