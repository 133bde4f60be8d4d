"""A plan: what one rank has to know of a packed stream that was cut over the ranks of a group."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from packc import config
from packc.distributed import groups, routing
from packc.distributed.ranks import check_that_all_agree, device_of, group_of
from packc.distributed.reach import Reach, reach
from packc.ops import documents
from packc.ops.mixer import Mixer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

EXCHANGES = ("auto", "all_gather", "ring", "doubling", "neighbour")


class Rank(IntEnum):
    """Rows of :attr:`Plan.ranks`. The first five have an entry a rank, the others one a step of a doubling exchange."""

    BEFORE = 0
    AFTER = 1
    SELF = 2
    RESET = 3
    STOP = 4
    KEEP_RIGHT = 5
    KEEP_LEFT = 6
    COLOUR_RIGHT = 7
    COLOUR_LEFT = 8


class Document(IntEnum):
    """Rows of :attr:`Plan.documents`."""

    ENTERS = 0
    LEAVES = 1
    ENDS = 2


class Place(IntEnum):
    """Entries of :attr:`Plan.places`."""

    BEGIN = 0
    END = 1
    ENTERS = 2
    LEAVES = 3
    BEGINS = 4


@dataclass(frozen=True, eq=False)
class Plan:
    """Made by :func:`plan`. What differs from rank to rank is in tensors, of shapes that are equal on all."""

    cu_seqlens: Tensor
    """Offsets in this rank's shard of its documents, ``(M + 1,)`` int32: of those that it has tokens of, and of empty
    ones that end here. M is one number on all ranks; what is left over is empty."""
    places: Tensor
    """``(5,)`` int64, see :class:`Place`: where the segment begins that goes on to the right, where the one ends that
    comes from the left, which of this rank's documents the latter and the former are (0 if there are none), and whether
    the former begins here."""
    documents: Tensor
    """``(3, M)`` bool, see :class:`Document`: that comes from the left, that goes on to the right, whose final state is
    this rank's."""
    offsets: Tensor
    """The same of all documents of the stream, ``(N + 1,)``: those of other ranks are empty here."""
    held: Tensor
    """Which of the stream's documents this rank's are: int64 ``(M,)``; 0 where none is."""
    found: Tensor
    """Where among them each document of the stream is: int64 ``(N,)``; M if elsewhere."""
    ranks: Tensor
    """``(9, W)`` bool, see :class:`Rank`."""
    tokens: Tensor
    """This rank's tokens in the stream: int64 ``(T_r,)``."""
    shards: Tensor
    """Where each token of the stream is among all shards, each padded to ``longest``: int64 ``(T,)``."""
    longest: int
    """Tokens of the longest shard."""
    size: int
    """W, the number of ranks."""
    group: str
    """Name of the group, the same on every rank."""
    exchange: str
    near: bool
    """Whether ``"auto"`` may choose ``"neighbour"``. The one fact of a batch that a graph depends on."""
    apart: bool
    """Whether no document has tokens on two ranks. Then nothing travels, unless the call is compiled: one graph serves
    all batches."""
    stream: tuple[int, ...]
    """The offsets of the documents in the stream."""
    cuts: tuple[int, ...]
    rank: int
    enters: bool
    """Whether a document comes from the left that has tokens here, as the host knows. Compiled calls do not ask."""
    leaves: bool
    """Whether one goes on to the right."""
    reaches: dict[bool, Reach] = field(default_factory=dict)
    """For attention that is causal, or not: made when first wanted."""

    def reach(self, causal: bool) -> Reach:
        """Whose keys attention wants. A compiled function finds it if it was made before, or runs once outside."""
        if causal not in self.reaches:
            if torch.compiler.is_compiling():
                raise RuntimeError(f"a plan for compiled attention: call plan.reach(causal={causal}) before")
            self.reaches[causal] = reach(self.stream, self.cuts, self.rank, causal, self.places.device)
        return self.reaches[causal]

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
        """What ``varlen_attention`` calls."""
        tensors = q, k, v, sinks, relative_bias
        if self._stays():
            options = (causal, scale, window, 0.0, None, softcap)
            return torch.ops.packc.varlen_attention.default(*tensors, self.cu_seqlens, *options)[0]
        wanted = self.reach(causal)
        return torch.ops.packc.varlen_attention_sharded.default(
            *tensors,
            self.cu_seqlens,
            causal,
            scale,
            window,
            softcap,
            wanted.sent,
            wanted.sends,
            wanted.receives,
            wanted.left,
            wanted.spans,
            wanted.of_cut,
            self.group,
        )

    def run(
        self,
        mixer: Mixer,
        arguments: Sequence[Any],
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
    ) -> Any:
        """What an op calls in the place of ``packc::<name>``; its tensors and options in ``arguments``."""
        like = arguments[mixer.tensor_names.index(mixer.like)]
        fits = not documents.differ(like.shape[1], self.tokens.shape[0])
        if config.check_plans and not torch.compiler.is_compiling():
            self._check_call(mixer, fits, arguments, initial_state)
        if not fits:
            raise ValueError(f"{mixer.name}: {mixer.like} has {like.shape[1]} tokens, which are not those of {self}")
        if initial_state is not None and self.size > 1:
            initial_state = initial_state.index_select(0, self.held)
        out, final_state = self._run(mixer, arguments, initial_state, output_final_state)
        if not output_final_state:
            return out
        if self.size > 1:
            elsewhere = final_state.new_zeros((1, *final_state.shape[1:]))
            final_state = torch.cat([final_state, elsewhere]).index_select(0, self.found)
        return out, final_state

    def _run(
        self, mixer: Mixer, arguments: Sequence[Any], initial_state: Tensor | None, output_final_state: bool
    ) -> Any:
        if self._stays():
            op = getattr(torch.ops.packc, mixer.name).default
            return op(*arguments, self.cu_seqlens, initial_state, output_final_state)[:2]
        if mixer.summary is None:
            raise NotImplementedError(f"{mixer.name} takes no plan: its declaration has no summary of a segment")
        compiled = torch.compiler.is_compiling()
        return getattr(torch.ops.packc, f"{mixer.name}_sharded").default(
            *arguments,
            self.cu_seqlens,
            self.places,
            self.documents,
            self.ranks,
            initial_state,
            output_final_state,
            self.size,
            self.group,
            self.exchange,
            self.near,
            compiled or self.enters,
            compiled or self.leaves,
        )

    def _stays(self) -> bool:
        """Whether the local op is all that there is to do."""
        return self.size == 1 or (not torch.compiler.is_compiling() and self.apart)

    def _check_call(self, mixer: Mixer, fits: bool, arguments: Sequence[Any], initial_state: Tensor | None) -> None:
        """Of everything but how many tokens there are, which differs."""
        shapes = [
            (x.dtype, tuple(x.shape[2:] if name in mixer.per_token else x.shape)) if isinstance(x, Tensor) else x
            for name, x in zip(
                [*mixer.tensor_names, *mixer.options, "initial_state"], [*arguments, initial_state], strict=True
            )
        ]
        text = repr((self.stream, self.cuts, self.exchange, fits, shapes))
        group = groups.of_name(self.group)
        check_that_all_agree(group, f"{mixer.name}: plan, shapes or options", text)

    def __repr__(self) -> str:
        low, high = self.cuts[self.rank : self.rank + 2]
        return (
            f"Plan(tokens {low}:{high} of {self.cuts[-1]} in {len(self.stream) - 1} documents, "
            f'rank {self.rank} of {self.size}, exchange="{self.exchange}")'
        )


def plan(
    cu_seqlens: Tensor | Sequence[int],
    mesh_or_group: DeviceMesh | dist.ProcessGroup,
    cuts: Sequence[int] | None = None,
    *,
    exchange: str = "auto",
) -> Plan:
    """How this rank takes part in a packed stream that is cut over the ranks of a group; to be made once a batch.

    All ranks of the group call it, with the same arguments. ``packc.config.check_plans`` makes sure that they did.

    Args:
        cu_seqlens: where documents begin in the whole stream and, behind them, its end T: ``(N + 1,)`` integers, N at
            least 1; empty documents are allowed. A tensor on a GPU is copied to the host.
        mesh_or_group: a one-dimensional ``DeviceMesh``, or a process group that this rank is in, of W ranks.
        cuts: ``W + 1`` offsets from 0 rising to T: rank q holds the tokens ``cuts[q] : cuts[q + 1]``, maybe none.
            Without it ranks hold equally many, the first ones one more if need be.
        exchange: how states travel: ``"all_gather"`` (LASP-2, https://arxiv.org/abs/2502.07563), ``"ring"`` (from rank
            to rank, LASP, https://arxiv.org/abs/2404.02882), ``"doubling"`` (in log2 W steps; Hillis and Steele, "Data
            parallel algorithms", 1986), ``"neighbour"`` (one step, where no document spans more than two ranks), or
            ``"auto"``, for which ``cost.py`` chooses, op by op. Results do not depend on it, but for rounding.

    Raises:
        TypeError, ValueError: an argument is not as said above; the message has its values. Also if a plan for
            ``"neighbour"`` has a document that spans more than two ranks, or if this rank is not in the group.
    """
    group, device = _group_and_device(mesh_or_group, cu_seqlens)
    size, rank = group.size(), group.rank()
    if config.check_plans:  # before anything that one rank alone might refuse
        given = [x.tolist() if isinstance(x, Tensor) else x and list(x) for x in (cu_seqlens, cuts)]
        check_that_all_agree(group, "plan: cu_seqlens, cuts or exchange", repr((given, exchange)))
    stream = offsets("plan: cu_seqlens", cu_seqlens)
    if len(stream) < 2:
        raise ValueError(f"plan: cu_seqlens must be N + 1 offsets of N >= 1 documents, not {list(stream)}")
    tokens = stream[-1]
    places = equal_cuts(tokens, size) if cuts is None else offsets("plan: cuts", cuts)
    if len(places) != size + 1 or places[-1] != tokens:
        raise ValueError(f"plan: cuts must be {size + 1} offsets from 0 to T = {tokens}, not {list(places)}")
    if exchange not in EXCHANGES:
        raise ValueError(f"plan: exchange must be one of {', '.join(EXCHANGES)}, not {exchange!r}")
    document, span = routing.longest_span(stream, places)
    if exchange == "neighbour" and span > 1:
        raise ValueError(
            f'plan: exchange="neighbour" cannot serve document {document}, tokens {stream[document]} to '
            f"{stream[document + 1]}, which spans {span + 1} ranks of cuts {list(places)}"
        )
    name = groups.join(group, device_of(group))
    groups.connect(group, exchange)
    return _plan(stream, places, rank, name, exchange, exchange == "auto" and span <= 1, span == 0, device)


def equal_cuts(tokens: int, size: int) -> tuple[int, ...]:
    """Offsets of ``size`` shards of ``tokens``, of which none has two more than another."""
    whole, rest = divmod(tokens, size)
    return tuple(whole * rank + min(rank, rest) for rank in range(size + 1))


def _plan(
    stream: tuple[int, ...],
    cuts: tuple[int, ...],
    rank: int,
    group: str,
    exchange: str,
    near: bool,
    apart: bool,
    device: torch.device,
) -> Plan:
    mine, size = routing.route(stream, cuts, rank), len(cuts) - 1
    of_ranks = [routing.held(stream, cuts, other) for other in range(size)]
    of_all, of_mine = range(len(stream) - 1), of_ranks[rank]
    # To compilers, one is special.
    count = len(of_all) if size == 1 else max(2, *map(len, of_ranks))
    padding = count - len(of_mine)
    starts = [mine.cu_seqlens[n] for n in of_mine] + [cuts[rank + 1] - cuts[rank]] * (padding + 1)
    held = [*of_mine, *[0] * padding]
    every = [*of_mine, *[-1] * padding]
    ranks, longest = range(size), max(high - low for low, high in pairwise(cuts))
    distances, mirrored = routing.steps(size), size - 1 - rank
    rows = [
        [other < rank for other in ranks],
        [other > rank for other in ranks],
        [other == rank for other in ranks],
        mine.reset,
        mine.stop,
        routing.keeps(mine.reset, rank),
        routing.keeps(mine.stop[::-1], mirrored),
        # From whom each step comes: a pair's colour is that of its left rank.
        [(rank - distance) // distance % 2 == 1 for distance in distances],
        [rank // distance % 2 == 1 for distance in distances],
    ]
    passing = [0 if document is None else document - of_mine.start for document in (mine.enters, mine.leaves)]
    places = [mine.begin, mine.end, *passing, mine.begins]
    shards = [torch.arange(high - low) + other * longest for other, (low, high) in enumerate(pairwise(cuts))]
    made = Plan(
        cu_seqlens=torch.tensor(starts, dtype=torch.int32, device=device),
        places=torch.tensor(places, dtype=torch.int64, device=device),
        documents=torch.tensor(
            [
                [n == mine.enters for n in every],
                [n == mine.leaves for n in every],
                [n >= 0 and mine.ends[n] for n in every],
            ],
            device=device,
        ),
        offsets=torch.tensor(mine.cu_seqlens, dtype=torch.int32, device=device),
        held=torch.tensor(held, dtype=torch.int64, device=device),
        found=torch.tensor([n - of_mine.start if n in of_mine else count for n in of_all], device=device),
        ranks=torch.tensor([row + [False] * (size - len(row)) for row in rows], device=device),
        tokens=torch.arange(cuts[rank], cuts[rank + 1], device=device),
        shards=torch.cat(shards).to(device),
        longest=longest,
        size=size,
        group=group,
        exchange=exchange,
        near=near,
        apart=apart,
        stream=stream,
        cuts=cuts,
        rank=rank,
        enters=mine.enters is not None,
        leaves=mine.leaves is not None,
    )
    if "torch._dynamo" in sys.modules:  # which is slow to import
        # Sizes that never vary: a compiler that takes them for symbols may find them equal to others, by chance.
        torch._dynamo.mark_static(made.places)
        torch._dynamo.mark_static(made.ranks)
        torch._dynamo.mark_static(made.documents, 0)
    return made


# ---- arguments -------------------------------------------------------------------------------------------------------


def _group_and_device(mesh_or_group: Any, cu_seqlens: Any) -> tuple[dist.ProcessGroup, torch.device]:
    group = group_of(mesh_or_group)
    if isinstance(cu_seqlens, Tensor) and cu_seqlens.device.type != "cpu":
        return group, cu_seqlens.device
    return group, device_of(group)


def offsets(name: str, given: Tensor | Sequence[int]) -> tuple[int, ...]:
    """``given``, rising from 0; ``name`` is what it is called if it is not."""
    if isinstance(given, Tensor):
        if given.dtype not in (torch.int32, torch.int64) or given.ndim != 1:
            raise TypeError(f"{name} must be int32 or int64 in one dimension, not {given.dtype} {given.shape}")
        given = given.tolist()
    try:
        found = tuple(int(offset) for offset in given)
        exact = all(a == b for a, b in zip(found, given, strict=True))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be integers, not {given!r}") from error
    if not exact:
        raise TypeError(f"{name} must be integers, not {given!r}")
    if not found or found[0] != 0 or any(a > b for a, b in pairwise(found)):
        raise ValueError(f"{name} must rise from 0, not be {list(found)}")
    return found
