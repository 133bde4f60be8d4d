"""Where documents begin inside a row: the one owner of boundaries that a caller hands over.

Collators that pack by themselves say where documents begin by ``position_ids`` that start again, by ``seq_idx`` or by
``cu_seq_lens_q``, which :mod:`packc.frontends.traced_call` makes inputs of the graph; for everything else there is
:func:`documents`. Without any of them a row is one document.
"""

from __future__ import annotations

import contextlib
import contextvars
import enum
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from packc.fake_tensors import has_values
from packc.frontends import BOUNDARIES
from packc.padding import tokens_by
from packc.passes import argument_path


class Kind(enum.Enum):
    """How a tensor says where documents begin."""

    POSITIONS = "positions that do not rise from one token to the next"
    NUMBERS = "another number than the token before"
    OFFSETS = "offsets into all rows, end to end"


POSITIONS = "position_ids"
KINDS = dict.fromkeys(BOUNDARIES, Kind.OFFSETS) | {POSITIONS: Kind.POSITIONS, "seq_idx": Kind.NUMBERS}


class Given(NamedTuple):
    """Boundaries that somebody handed over."""

    name: str
    values: Tensor
    around: bool = False
    """By :func:`documents`; otherwise among the model's arguments."""
    of: str | None = None
    """The path of an input, or the end of one: of which rows they are, where there are several sequences."""

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]

    @property
    def strictly(self) -> bool:
        """Whether a document begins only where they fall: of several axes, as the patches of an image share one."""
        return self.values.ndim > 2

    @property
    def of_model(self) -> bool:
        """Whether they are positions of the model's own, by which it may make attention masks."""
        return self.kind is Kind.POSITIONS and not self.around


_active: contextvars.ContextVar[tuple[Given, ...]] = contextvars.ContextVar("packc_documents", default=())
_heeded: contextvars.ContextVar[tuple[Given, ...]] = contextvars.ContextVar("packc_heeded", default=())
"""What a compiled graph asked for last."""
_UNHEEDED = (
    "packc.documents: nothing that packc compiled ran in this block, and nothing else keeps documents apart. If the"
    " model is compiled, torch ran it as it is (TORCH_LOGS=recompiles): as a rule behind"
    " torch._dynamo.config.recompile_limit"
)

Boundaries = Tensor | Mapping[str, Tensor]
"""Of the only sequence of a model; or of several, each by the path of an input of it."""


@contextlib.contextmanager
def documents(
    *,
    cu_seqlens: Boundaries | None = None,
    position_ids: Boundaries | None = None,
    seq_idx: Boundaries | None = None,
) -> Iterator[None]:
    """Say where documents begin in rows that hold several, for every compiled model that is called in this block.

    Nothing flows from one document to another, in the forward, the backward and what the graph recomputes; positions
    that the model counts by itself start again with each. Exactly one is given. Where a model reads several sequences,
    each in rows of its own, it is a mapping from an input of each, by its path in the call as ``packc.mask`` has it
    (``chosen.attention_mask``, or the end of it), to a tensor; rows that are not named are a document each.

    Args:
        cu_seqlens: integer ``(N + 1,)``, rising from 0 to ``B * L``: document n is the positions
            ``cu_seqlens[n] : cu_seqlens[n + 1]`` of all rows, end to end. A row's end always ends a document.
        position_ids: integer ``(B, L)``, ``(1, L)`` or ``(L,)``: a document begins where they do not rise.
        seq_idx: integer ``(B, L)``, ``(1, L)`` or ``(L,)``: a document begins where the number changes.

    Raises:
        TypeError: none or several are given, or one that is no integer tensor.
        NotPacked: when a model is called whose graph cannot keep documents of one row apart; the message says why.
        ValueError: when a model is called whose rows are of another size, or with offsets that do not rise to B * L, or
            that has no input of a name, or several.
    """
    given = {"cu_seqlens": cu_seqlens, "position_ids": position_ids, "seq_idx": seq_idx}
    named = [(name, values) for name, values in given.items() if values is not None]
    if len(named) != 1:
        raise TypeError(f"packc.documents takes one of {', '.join(given)}; {len(named)} are given")
    ((name, values),) = named
    by_path: Mapping[str | None, Tensor] = values if isinstance(values, Mapping) else {None: values}  # type: ignore[assignment]
    for each in by_path.values():
        if not isinstance(each, Tensor) or each.is_floating_point() or each.dtype == torch.bool:
            raise TypeError(f"packc.documents: {name} must be a tensor of integers")
    said = tuple(Given(name, each, around=True, of=path) for path, each in by_path.items())
    token, heeded_before = _active.set(said), _heeded.get()
    try:
        yield
    finally:
        _active.reset(token)
    if _heeded.get() is not said:
        warnings.warn(_UNHEEDED, stacklevel=3)
    _heeded.set(heeded_before)


def handed_over() -> tuple[Given, ...]:
    """What :func:`documents` says of the call that is being made."""
    given = _active.get()
    _heeded.set(given)
    return given


def of_streams(around: Sequence[Given], streams: Sequence[Sequence[str]]) -> list[list[Given]]:
    """What was handed over around a call, for each of several sequences.

    Args:
        streams: the paths of the inputs of each.

    Raises:
        ValueError: one is of no sequence, or may be of several.
    """
    found: list[list[Given]] = [[] for _ in streams]
    for each in around:
        if each.of is None:
            found[0].append(each)
            continue
        wanted = each.of.split(".")
        meant = [n for n, paths in enumerate(streams) if any(p.split(".")[-len(wanted) :] == wanted for p in paths)]
        if len(meant) != 1:
            known = sorted(path for paths in streams for path in paths)
            raise ValueError(
                f"packc.documents: {each.of!r} is of {len(meant)} packed sequences; the inputs of such are {known}"
            )
        found[meant[0]].append(each)
    return found


class BoundaryInput(NamedTuple):
    """An input of a graph by whose values a caller may say where documents begin."""

    number: int
    name: str
    path: str

    def is_of(self, other: str) -> bool:
        """Whether it speaks of the sequence of an input with this path: ``chosen.seq_idx`` of ``chosen.input_ids``."""
        return self.is_of_all or self.path.rpartition(".")[0] == other.rpartition(".")[0]

    @property
    def is_of_all(self) -> bool:
        """Whether it is an argument of the call itself, beside all sequences."""
        return "." not in self.path

    def given(self, inputs: Sequence[Any]) -> Given:
        return Given(self.name, inputs[self.number])


def boundary_inputs(gm: fx.GraphModule) -> list[BoundaryInput]:
    """Those of a Dynamo graph."""
    found = []
    for number, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        path, value = argument_path(node), node.meta.get("example_value")
        name = path.split(".")[-1]
        if name in KINDS and isinstance(value, Tensor) and value.ndim:
            found.append(BoundaryInput(number, name, path))
    return found


def say_something(given: Sequence[Given], mask: Tensor | None = None) -> bool:
    """Whether there may be several documents in a row, as far as can be told without the rows.

    ``mask``: what attention is masked by (:func:`packc.padding.tokens_by`).
    """
    return any(has_values(each.values) and _says_something(each, mask) for each in given)


def _says_something(given: Given, mask: Tensor | None) -> bool:
    if given.kind is Kind.OFFSETS:
        return given.values.numel() > 2
    values = _rows(given)
    real = None if mask is None or values.ndim != 2 else tokens_by(mask, values.shape[1])
    if real is not None and len(values) in (1, len(real)):
        return bool(_begin_at(given.kind, values.expand(real.shape), real, strictly=given.strictly).any())
    return bool(_begins(given.kind, values[..., :-1], values[..., 1:], strictly=given.strictly).any())


@dataclass(frozen=True)
class Starts:
    """Where documents begin within rows, and what is wrong with what was handed over."""

    begins: Tensor
    """(B, L), bool: at tokens that begin a document behind another one in their row."""
    disagree: Tensor
    """0-d bool: two that say where documents begin say different things."""
    not_offsets: Tensor
    """0-d bool: offsets do not rise from 0 to B * L."""
    gaps: Tensor
    """(B,), bool: positions of a row leave some out."""
    elsewhere: Tensor
    """0-d bool: documents begin where no positions among the model's arguments start again."""


def starts(given: Sequence[Given], real: Tensor) -> Starts:
    """
    Args:
        given: what was handed over of these rows.
        real: ``(B, L)``, true at tokens; what lies at padding says nothing.

    Raises:
        ValueError: one is of another size than the rows.
    """
    nowhere = torch.zeros_like(real)
    no = nowhere.any()
    result = Starts(nowhere, no, no, nowhere.any(1), no)
    of_positions = nowhere
    by_name: dict[str, Tensor] = {}
    for each in given:
        values = _of_tokens(each, real)
        if values is None:
            continue
        begins = F.pad(_begin_at(each.kind, values, real, strictly=each.strictly), (1, 0))
        # Of two that are called the same, one that says nothing says that a row is one document.
        both = result.begins.any() & begins.any()
        both |= (begins != by_name.setdefault(each.name, begins)).any()
        wrong, gaps = result.not_offsets, result.gaps
        if each.kind is Kind.OFFSETS:
            rising = each.values.diff().ge(0).all() & (each.values[0] == 0) & (each.values[-1] == real.numel())
            wrong = wrong | ~rising
        if each.of_model:
            gaps = gaps | (_behind(real) & (values[:, 1:] - _at_token_before(values, real) > 1)).any(1)
            of_positions = of_positions | begins
        disagree = result.disagree | (both & (begins != result.begins).any())
        all_begins = result.begins | begins
        result = Starts(all_begins, disagree, wrong, gaps, no)
    return replace(result, elsewhere=(result.begins & ~of_positions).any())


def _begin_at(kind: Kind, values: Tensor, real: Tensor, *, strictly: bool) -> Tensor:
    """(B, L - 1), bool: whether a position but the first is a token that begins a document behind another one."""
    return _behind(real) & _begins(kind, _at_token_before(values, real), values[:, 1:], strictly=strictly)


def _behind(real: Tensor) -> Tensor:
    """(B, L - 1), bool: whether a position but the first is a token behind another one."""
    return real[:, 1:] & (real.cumsum(1)[:, :-1] > 0)


def _begins(kind: Kind, before: Tensor, values: Tensor, *, strictly: bool) -> Tensor:
    """Whether a token begins a document, by its value and that of the token before it."""
    if kind is not Kind.POSITIONS:
        return values != before
    return values < before if strictly else values <= before


def _rows(given: Given) -> Tensor:
    """``(B, L)`` or ``(1, L)``; of positions ``(axes, B, L)``, several a token, the first axis counts."""
    return given.values[0] if given.values.ndim > 2 else torch.atleast_2d(given.values)


def fitting(given: Given, B: int, L: int) -> Tensor | None:
    """Its values ``(B, L)`` or ``(1, L)``, of offsets ``(N + 1,)``; None if they are none of each token's, as
    coordinates are not.

    Raises:
        ValueError: they are of another size than the rows.
    """
    if given.kind is Kind.OFFSETS:
        if given.values.ndim != 1 or given.values.numel() < 2:
            raise ValueError(f"{given.name} must be (N + 1,), not {tuple(given.values.shape)}")
        return given.values
    rows = _rows(given)
    if rows.ndim == 2 and len(rows) in (1, B) and rows.shape[1] == L:
        return rows
    if given.of_model:
        return None
    raise ValueError(f"{given.name} {tuple(given.values.shape)} does not fit rows of tokens ({B}, {L})")


def _of_tokens(given: Given, real: Tensor) -> Tensor | None:
    """``(B, L)``, the value of every token."""
    values = fitting(given, *real.shape)
    if values is None or given.kind is not Kind.OFFSETS:
        return None if values is None else values.to(real.device).expand(real.shape)
    places = torch.arange(real.numel(), device=real.device, dtype=values.dtype)
    return torch.searchsorted(values.to(real.device), places, right=True).view(real.shape)


def _at_token_before(values: Tensor, real: Tensor) -> Tensor:
    """(B, L - 1): of every position but the first, the value of the last token before it."""
    places = torch.arange(real.shape[1], device=real.device)
    last = torch.where(real, places, 0).cummax(1).values
    return values.gather(1, last[:, :-1])
