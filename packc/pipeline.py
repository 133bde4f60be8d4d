"""The passes, in order, and what runs them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from time import perf_counter

from torch import fx

from packc import config, passes
from packc.passes import Graph, NoMask, NotPackable
from packc.private_torch import private_torch

with private_torch():
    from torch._logging import trace_structured

log = logging.getLogger(__name__)


class UnknownPass(ValueError):
    """``packc.skip_passes`` names no pass, or one that nothing packs without."""


Pass = Callable[[Graph], Graph]

READ: tuple[Pass, ...] = (
    passes.normalize,  # Dynamo's graph -> pre-dispatch ATen
    passes.row_wise,  # functions of rows, a node each; first, for their marks are read by nobody
    passes.constants,  # no tensors of numbers
    passes.functional,  # no writes in place, where nobody holds a view
    passes.causal_convs,  # convolutions that are causal -> packc's
    passes.token_major,  # channel-first values computed with channels last
    passes.cut_late,  # logits cut along the sequence after what is computed of them
    passes.widen_losses,  # next-token losses over whole rows
    passes.written_out_attention,  # softmax(q @ k) @ v as one op
    passes.attention_as_written,  # any other attention written out, a node each
    passes.find_masks,  # the inputs that may be the padding mask; for documents alone find_rows, of tokens
)
FIND: tuple[Pass, ...] = (  # by the likeliest mask; by the next, should that be none
    passes.token_shifts,  # each token's value given to the next -> a convolution of packc's
    passes.layout,  # where batch and sequence are in every value, and how every op reads on tokens
    passes.zeros,  # what is zero at padding
    passes.confirm_mask,  # that the mask is used as one
    passes.attention_masks,  # what attention lets tokens see
)
PACK: tuple[Pass, ...] = (
    passes.pack_attention,  # attention as a mixer
    passes.choose,  # what is computed packed, padded, or both
    passes.requirements,  # what each batch must be asked
    passes.write,  # the packed graph
)
# Without one of these less packs; the others are what packing is.
_MAY_BE_SKIPPED = (
    passes.functional,
    passes.token_major,
    passes.token_shifts,
    passes.cut_late,
    passes.widen_losses,
    passes.written_out_attention,
    passes.attention_as_written,
    passes.pack_attention,
)


def packed_graph(graph: Graph, *, for_documents: bool = False) -> Graph:
    """The packed form of a graph from Dynamo.

    Args:
        for_documents: a graph without a padding mask is packed too, with every position a token, for documents within
            its rows.

    Raises:
        NoMask, NotPackable: there is none; the message says why.
        UnknownPass: ``packc.config.skip_passes`` names none that may be left out.
    """
    skipped = _skipped()
    _artifact("packc_before", graph.gm)
    graph = _run(READ[:-1], graph, skipped)
    try:
        return _by_mask(_run(READ[-1:], graph, skipped), skipped)
    except NoMask as no_mask:
        if not for_documents:
            raise
        try:
            return replace(_by_rows(passes.find_rows(graph), skipped), no_mask=str(no_mask))
        except (NoMask, NotPackable) as reason:
            no_mask.for_documents = str(reason)
        raise


def _by_mask(graph: Graph, skipped: set[Pass]) -> Graph:
    """By the likeliest mask; by the next, should that be none."""
    reasons: list[NoMask | NotPackable] = []
    masks = graph.masks if graph.ranks is not None else _attended_first(graph)
    for mask in masks:
        try:
            packed = _packed(replace(graph, mask=mask), skipped)
        except (NoMask, NotPackable) as reason:
            reasons.append(reason)
            continue
        if packed.ranks is not None:  # of one sequence; others are the same on all
            return packed
        return _with_further_streams(packed, [each.name for each in masks], skipped)
    raise reasons[0]


def _attended_first(graph: Graph) -> list[fx.Node]:
    """The masks, those last whose tokens attend to other sequences: keys are packed before their queries."""

    def attends(mask: fx.Node) -> bool:
        try:
            return passes.attends_to_others(passes.layout(replace(graph, mask=mask)))
        except NotPackable:
            return False

    return sorted(graph.masks, key=attends) if len(graph.masks) > 1 else graph.masks


def _with_further_streams(packed: Graph, masks: list[str], skipped: set[Pass]) -> Graph:
    """The sequences of the other masks packed too, those that can be."""
    done = {node.name for node in packed.tokens.kinds}
    for mask in masks:
        if mask in done:
            continue
        try:
            packed = _packed(_next_stream(packed, mask), skipped, of=packed)
        except (NoMask, NotPackable) as reason:
            log.info("the sequence of %s is not packed: %s", mask, reason)
            continue
        done |= {node.name for node in packed.tokens.kinds}
    return packed


def _next_stream(packed: Graph, mask: str) -> Graph:
    graph = passes.with_inputs_of_its_own(packed)
    return replace(graph, mask=next(node for node in graph.placeholders if node.name == mask))


def _by_rows(graph: Graph, skipped: set[Pass]) -> Graph:
    """By the first rows with which all that looks along them knows documents; else by the first at all."""
    packed: list[Graph] = []
    reasons: list[NotPackable] = []
    for rows in graph.masks:
        try:
            packed.append(_packed(replace(graph, mask=rows), skipped))
        except NotPackable as reason:
            reasons.append(reason)
            continue
        if packed[-1].requirements.one_document is None:
            return packed[-1]
    if not packed:
        raise reasons[0]
    return packed[0]


def _packed(graph: Graph, skipped: set[Pass], of: Graph | None = None) -> Graph:
    """Packed by the graph's mask, and once more for batches that keep padding which attention must not see.

    ``of``: another sequence of it has been packed already, in both forms.
    """
    found = _run(FIND, graph, skipped)
    packed = _run(PACK, found, skipped)
    packed = replace(packed, streams=[*graph.streams, packed.requirements])
    _artifact("packc_after", packed.gm)
    before = of.with_padding if of is not None else None
    if before is not None:
        found = _run(FIND, _next_stream(before, graph.mask.name), skipped)
    if (packed.requirements.only_tokens and packed.ranks is None) or before is not None:
        padded = _run(PACK, found, {*skipped, passes.pack_attention})
        streams = [*(before or graph).streams, padded.requirements]
        return replace(packed, with_padding=replace(padded, streams=streams))
    return packed


def _skipped() -> set[Pass]:
    may = {each.__name__: each for each in _MAY_BE_SKIPPED}
    given: str | list[str] = config.skip_passes or []
    names = given.split(",") if isinstance(given, str) else given
    unknown = [name for name in names if name not in may]
    if unknown:
        raise UnknownPass(f"packc.skip_passes: {unknown} cannot be left out; it takes {sorted(may)}")
    return {may[name] for name in names}


def _run(sequence: Sequence[Pass], graph: Graph, skipped: set[Pass]) -> Graph:
    for each in sequence:
        name = each.__name__
        if each in skipped:
            log.info("%s is skipped", name)
            continue
        before, start = _ops(graph.gm), perf_counter()
        try:
            graph = each(graph)
        except NotPackable as reason:
            raise NotPackable(str(reason), passes.boundaries_of(graph)) from None
        took, after = perf_counter() - start, _ops(graph.gm)
        log.debug("%s: %.0f ms %s", name, 1e3 * took, _difference(before, after))
        if before != after and each is not passes.write:  # whose graph is shown as packc_after
            _artifact(f"packc_{name}", graph.gm)
    return graph


def _ops(gm: fx.GraphModule) -> Counter[str]:
    return Counter(str(node.target) for node in gm.graph.nodes if node.op == "call_function")


def _difference(before: Counter[str], after: Counter[str]) -> str:
    """``+2 aten.cat.default, -1 aten.slice.Tensor``."""
    changes = {op: after[op] - before[op] for op in before | after}
    return ", ".join(f"{change:+} {op}" for op, change in sorted(changes.items()) if change)


def _artifact(name: str, gm: fx.GraphModule) -> None:
    """The graph in the structured trace (tlparse), and in full under TORCH_LOGS="+packc"."""
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s\n%s", name, gm.print_readable(print_output=False))
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=lambda: gm.print_readable(print_output=False, include_stride=True, include_device=True),
    )
