"""A stream that is longer than memory, one chunk after another on one machine: ranks in time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from packc.distributed.plans import offsets
from packc.distributed.routing import Routing, held, route
from packc.ops.mixer import Mixer


def in_chunks(
    function: Callable[..., Any],
    *tensors: Tensor,
    cu_seqlens: Tensor | Sequence[int],
    chunk: int,
    recompute: bool = True,
) -> Any:
    """``function(*tensors, plan=...)`` of a stream, ``chunk`` tokens at a time, whose states are carried along.

    What ``function`` keeps for the backward is there for one chunk at a time; beside it there are ``tensors``, the
    results, and for each cut document one state of each op. Gradients are those of the whole stream: they flow back
    through the states.

    Args:
        function: of chunks of ``tensors``, and of ``plan``, which it gives to packc's ops in the place of
            ``cu_seqlens``; the same ops in the same order each time. Whatever else it does is token by token. It
            returns a tensor or a tuple of tensors.
        tensors: the stream, ``(1, T, ...)`` each.
        cu_seqlens: ``(N + 1,)``, where documents begin in the stream, and its end.
        chunk: at least 1; tokens of a chunk, of which the last one may have fewer.
        recompute: runs a chunk again in the backward instead of keeping what it has computed
            (``torch.utils.checkpoint``). Without it, nothing is saved but the first forward's peak.

    Returns:
        What ``function`` returns, of the whole: tensors ``(1, t, ...)`` joined along their tokens, and tensors without
        axes, as sums of losses, added.

    Raises:
        TypeError, ValueError: an argument is not as said above.
        NotImplementedError: ``function`` calls ``varlen_attention``, whose state would be all tokens so far.
    """
    stream = offsets("in_chunks: cu_seqlens", cu_seqlens)
    if len(stream) < 2 or chunk < 1:
        raise ValueError(f"in_chunks: at least one document and chunks of a token; got {list(stream)} and {chunk}")
    for x in tensors:
        if x.ndim < 2 or x.shape[:2] != (1, stream[-1]):
            raise ValueError(f"in_chunks: tensors must be (1, {stream[-1]}, ...), not {tuple(x.shape)}")
    cuts = [*range(0, stream[-1], chunk), stream[-1]] if stream[-1] else [0, 0]

    def run(number: int, states: Sequence[Tensor | None], *pieces: Tensor) -> tuple[Any, list[Tensor | None]]:
        of_chunk = route(stream, cuts, number), held(stream, cuts, number)
        plan = _Chunk(*of_chunk, states, tensors[0].device)
        return function(*pieces, plan=plan), plan.leaving

    states: Sequence[Tensor | None] = ()
    found = []
    for n, (low, high) in enumerate(pairwise(cuts)):
        pieces = [x[:, low:high] for x in tensors]
        if recompute:
            result, states = checkpoint(run, n, states, *pieces, use_reentrant=False)
        else:
            result, states = run(n, states, *pieces)
        found.append(result)
    if isinstance(found[0], tuple):
        return tuple(map(_joined, zip(*found, strict=True)))
    return _joined(found)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(tuple(parts)).sum(0) if parts[0].ndim == 0 else torch.cat(tuple(parts), 1)


class _Chunk:
    """A plan whose ranks come one after the other; a :class:`packc.ops.sharded.Plan`."""

    def __init__(
        self, routing: Routing, documents: range, entering: Sequence[Tensor | None], device: torch.device
    ) -> None:
        self.offsets = torch.tensor(routing.cu_seqlens, dtype=torch.int32, device=device)
        self.leaving: list[Tensor | None] = []
        self._routing, self._entering, self._documents = routing, entering, documents
        # Of the chunk's documents alone: of each there is a state.
        self._local = self.offsets[documents.start : documents.stop + 1]

    def run(
        self, mixer: Mixer, arguments: Sequence[Any], initial_state: Tensor | None, output_final_state: bool
    ) -> Any:
        """The local op, between the states of the document that enters and of the one that leaves."""
        op, mine, here = getattr(torch.ops.packc, mixer.name).default, self._routing, self._documents
        if initial_state is not None:
            initial_state = initial_state[here.start : here.stop]
        if mine.enters is not None:
            entering = self._entering[len(self.leaving)]
            assert entering is not None
            if initial_state is None:
                initial_state = entering.new_zeros((len(here), *entering.shape[1:]))
            row = torch.tensor([mine.enters - here.start], device=entering.device)
            initial_state = initial_state.to(entering.dtype).index_copy(0, row, entering)
        wanted = output_final_state or mine.leaves is not None
        out, final_state, *_ = op(*arguments, self._local, initial_state, wanted)
        last = None if mine.leaves is None else mine.leaves - here.start
        self.leaving.append(None if last is None else final_state[last : last + 1])
        if not output_final_state:
            return out
        ends = torch.tensor(mine.ends[here.start : here.stop], device=out.device)
        final_state = torch.where(ends.view(-1, *[1] * (final_state.ndim - 1)), final_state, 0)
        around = [final_state.new_zeros((n, *final_state.shape[1:])) for n in (here.start, len(mine.ends) - here.stop)]
        return out, torch.cat([around[0], final_state, around[1]])

    def attention(self, *_: Any) -> Tensor:
        raise NotImplementedError("in_chunks: varlen_attention has no state but all tokens so far")
