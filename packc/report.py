"""What packc did to a model: ``print(packc.explain(model)(**batch))``."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import fx

from packc import config
from packc.communication import Communication, inner, noting
from packc.options import SequenceOptions, split_options, take_sequence
from packc.passes import Boundary, Requirements, mixers_of, module_path
from packc.passes.overlap import Schedule
from packc.totals import uncounted

if TYPE_CHECKING:
    from packc.packed_call import PackedCall


class Mixer(NamedTuple):
    """An op that looks along the sequence."""

    op: str
    module: str
    packed: bool


@dataclass
class GraphReport:
    """One compiled graph."""

    mixers: list[Mixer]
    boundaries: list[Boundary] = field(default_factory=list)
    fallback: str | None = None
    call: PackedCall | None = None
    schedules: list[Schedule] = field(default_factory=list)
    """With ``packc.sequence``: what its collectives are run beside."""

    @classmethod
    def packed(cls, streams: Sequence[Requirements], call: PackedCall) -> GraphReport:
        padded = streams[-1].padded_mixers
        counts = Counter(each.reason for each in padded)
        return cls(
            [Mixer(op, module, True) for stream in streams for op, module in stream.mixers]
            + [Mixer(each.node, each.module, False) for each in padded],
            _boundaries(streams),
            "; ".join(f"{count} mixers run padded: {reason}" for reason, count in counts.items()) or None,
            call,
        )

    @classmethod
    def unpacked(cls, gm: fx.GraphModule, reason: str, boundaries: Sequence[Boundary] = ()) -> GraphReport:
        """Of a graph from Dynamo that runs as it was."""
        nodes = mixers_of(gm)
        return cls([Mixer(str(node.target), module_path(node), False) for node in nodes], list(boundaries), reason)


def _boundaries(streams: Sequence[Requirements]) -> list[Boundary]:
    """Those of all sequences; one between two of them, once."""
    found: list[Boundary] = []
    for stream in streams:
        found += [each for each in stream.boundaries if each not in found] if found else stream.boundaries
    return found


class Stream(NamedTuple):
    """A sequence that is packed."""

    mask: str
    """Path of its mask among the arguments; without padding, of an input of its tokens."""
    tokens: int
    """That the packed graph worked on."""
    padded_tokens: int
    """B * L of the same batch."""


@dataclass
class Report:
    """What :func:`explain` found. ``str()`` is for people."""

    mixers: list[Mixer]
    """Every op of packc's that looks along the sequence: op, module path, whether it runs packed."""
    boundaries: list[Boundary]
    """Every other op that reads its operands padded, because it mixes tokens or may: node, module path, reason."""
    tokens: int | None
    """Tokens that the packed graph worked on, of all sequences; None when nothing was packed."""
    padded_tokens: int | None
    """B * L of the same batch, of all sequences."""
    fallback: str | None
    """Why the graph, or rows of the batch, ran padded; None if all was packed."""
    graphs: int = 1
    """How many graphs Dynamo made of the model."""
    streams: list[Stream] = field(default_factory=list)
    """The sequences that are packed: one, or several in a graph, each with its own mask."""
    tokens_here: int | None = None
    """With ``packc.sequence``: how many of the tokens are this rank's."""
    communication: Communication | None = None
    """With ``packc.sequence``: what a step waits for, and a timeline to be saved."""

    def __str__(self) -> str:
        lines = [f"packc: {self._headline()}"]
        if self.tokens is not None and self.padded_tokens:
            share = 1 - self.tokens / self.padded_tokens
            lines.append(f"  tokens      {self.tokens} of {self.padded_tokens} padded ({share:.1%} left out)")
        if len(self.streams) > 1:
            lines.append(f"  sequences   {len(self.streams)}")
            lines.extend(f"    {each.mask}: {each.tokens} of {each.padded_tokens}" for each in self.streams)
        lines.append(f"  mixers      {len(self.mixers)}")
        width = max((len(mixer.op) for mixer in self.mixers), default=0)
        lines.extend(
            f"    {mixer.op:<{width}}  {'packed' if mixer.packed else 'padded'}  {mixer.module}"
            for mixer in self.mixers
        )
        lines.append(f"  boundaries  {len(self.boundaries) or 'none'}")
        lines.extend(f"    {boundary}" for boundary in self.boundaries)
        if self.tokens_here is not None:
            lines.append(f"  this rank   {self.tokens_here} of {self.tokens} tokens")
        if self.communication is not None:
            lines.append(str(self.communication))
        if self.fallback:
            lines.append(f"  not packed  {self.fallback}")
        return "\n".join(lines)

    def _headline(self) -> str:
        graphs = f"{self.graphs} graph{'s' if self.graphs != 1 else ''}"
        if self.tokens is None:
            return f"nothing packed ({graphs})"
        if not self.mixers and self.boundaries:
            return f"packed what works token by token; what looks along the sequence runs padded ({graphs})"
        return f"packed {sum(mixer.packed for mixer in self.mixers)} of {len(self.mixers)} mixers ({graphs})"


_seen: contextvars.ContextVar[list[GraphReport] | None] = contextvars.ContextVar("packc_explained", default=None)


def explain(model: Callable[..., Any], *, options: dict[str, Any] | None = None) -> Callable[..., Report]:
    """Run a model once on a batch as packc would compile it, and say what became of it.

    Graphs are rewritten and run without code generation, so this takes seconds where compiling takes minutes. Gradients
    are not computed. A model that is compiled already is looked at as it was before. With ``packc.sequence``, all ranks
    of the group call it, and its report tells what a step waits for, backward included unless under ``no_grad``.

    Args:
        model: a module or a function.
        options: as for ``torch.compile``; of these only packc's own count, and ``packc.strict`` and ``packc.inner`` do
            not.

    Returns:
        A function that takes the model's arguments and returns a :class:`Report`.

    Raises:
        ValueError: an unknown ``packc.`` option.
    """
    original = getattr(model, "_orig_mod", model)
    sequence, others = take_sequence(options)
    own, _ = split_options(others)
    over_ranks = sequence.group is not None

    def run(*args: Any, **kwargs: Any) -> Report:
        graphs: list[GraphReport] = []
        token = _seen.set(graphs)
        try:
            # Entries of an explained model are its own, and must not use up what Dynamo grants the compiled one.
            with (
                contextlib.nullcontext() if over_ranks else torch.no_grad(),
                uncounted(),
                torch._dynamo.config.patch(recompile_limit=64),
                config.patch({**own, "inner": inner() if over_ranks else "eager", "strict": False}),
                _not_compiled(original),
            ):
                explaining = _explaining(repr(config.get_config_copy()), sequence)
                torch.compile(original, backend=explaining)(*args, **kwargs)
        finally:
            _seen.reset(token)
        return _merge(graphs)

    return run


@contextlib.contextmanager
def _not_compiled(model: Any) -> Iterator[None]:
    """After ``model.compile()`` a module calls what it compiled; here it is to be called itself."""
    compiled = getattr(model, "_compiled_call_impl", None)
    if compiled is None:
        yield
        return
    model._compiled_call_impl = None
    try:
        yield
    finally:
        model._compiled_call_impl = compiled


@functools.cache
def _explaining(configuration: str, sequence: SequenceOptions) -> Callable[..., Any]:
    """packc's backend without code generation, whose graphs report themselves when they run.

    One for each configuration: by its backend Dynamo tells what it has compiled of a model already.
    """
    from packc.compiler import compile_graph, over_several_ranks

    def explaining(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        over = None if sequence.group is None else over_several_ranks(sequence)
        with noting() as schedules:
            call, graph = compile_graph(gm, example_inputs, strict=False, sequence=over)
        graph.schedules = schedules

        def reporting(*inputs: Any) -> Any:
            result = call(*inputs)
            seen = _seen.get()
            if seen is not None:
                seen.append(graph)
            return result

        return reporting

    explaining.__packc_backend__ = True  # type: ignore[attr-defined]
    return explaining


def _merge(graphs: list[GraphReport]) -> Report:
    from packc.sharded_call import ShardedCall

    calls = [graph.call for graph in graphs if graph.call is not None and graph.call.last]
    packings = [packing for call in calls for packing in call.last]
    # Pieces of one model work on the same tokens: those of the first.
    streams = [
        Stream(stream.mask_path, packing.tokens, packing.padded_tokens)
        for call in calls[:1]
        for stream, packing in zip(call.streams, call.last, strict=True)
    ]
    reasons: dict[str, None] = dict.fromkeys(
        [graph.fallback for graph in graphs if graph.fallback]
        + [reason for packing in packings for reason in packing.reasons]
    )
    schedules = sorted((each for graph in graphs for each in graph.schedules), key=lambda each: each.name != "forward")
    if not graphs:
        reasons = {"Dynamo captured no graph of the model (TORCH_LOGS=graph_breaks,recompiles says why)": None}
    return Report(
        mixers=[mixer for graph in graphs for mixer in graph.mixers],
        boundaries=[boundary for graph in graphs for boundary in graph.boundaries],
        tokens=sum(each.tokens for each in streams) if streams else None,
        padded_tokens=sum(each.padded_tokens for each in streams) if streams else None,
        fallback="; ".join(reasons) or None,
        graphs=len(graphs),
        streams=streams,
        tokens_here=next((call.tokens_here for call in calls if isinstance(call, ShardedCall)), None),
        communication=Communication(schedules) if schedules else None,
    )
