"""Documents: the stretches of a ``(B, L, ...)`` sequence between which nothing flows.

Without ``cu_seqlens`` a document is a batch row. With ``cu_seqlens = [0, ..., L]`` (B is 1) document n is the tokens
``cu_seqlens[n] : cu_seqlens[n + 1]``; it may be empty. Tokens are counted through all rows, ``0 .. B * L``.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false


def check_cu_seqlens(cu_seqlens: Tensor | None, x: Tensor, name: str = "x", own: str = "cu_seqlens") -> None:
    """Raises if ``cu_seqlens``, called ``own``, cannot divide ``x (B, L, ...)``. Reads no data, so it may be traced."""
    if cu_seqlens is None:
        return
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{own} must be int32 or int64, not {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1:
        raise ValueError(f"{own} must have shape (N + 1,), not {tuple(cu_seqlens.shape)}")
    if differ(x.shape[0], 1):
        raise ValueError(f"with {own}, {name} must be one packed row (1, L, ...), not {tuple(x.shape)}")
    if guard_or_false(cu_seqlens.shape[0] == 0):
        raise ValueError(f"{own} must have shape (N + 1,), not (0,)")
    if cu_seqlens.device != x.device:
        raise ValueError(f"{own} is on {cu_seqlens.device}, {name} on {x.device}")


def differ(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are known to differ: sizes that only a run can tell are left to the kernels to check."""
    return guard_or_false(a != b)


def count(cu_seqlens: Tensor | None, x: Tensor) -> int:
    """N, the number of documents."""
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def offsets(cu_seqlens: Tensor | None, x: Tensor) -> Tensor:
    """Where documents begin and, behind them, the end: int64 ``(N + 1,)``. Not for tracing: it checks values."""
    B, L = x.shape[:2]
    if cu_seqlens is None:
        return torch.arange(B + 1, device=x.device) * L
    starts = cu_seqlens.long()
    if starts.device.type == "cpu":
        check_offsets(starts, L)
    return starts


def check_offsets(starts: Tensor, L: int, name: str = "cu_seqlens") -> None:
    """Raises unless the documents cover the ``L`` tokens in order."""
    if starts[0] != 0 or starts[-1] != L or (starts.diff() < 0).any():
        raise ValueError(f"{name} must rise from 0 to L = {L}, not {starts.tolist()}")


_MADE = "_packc_made"


def made_once(cu_seqlens: Tensor) -> Tensor:
    """Offsets that nobody will write to behind torch's back: what kernels make of them is kept as long as they live.

    Said of a batch's, which enter a compiled graph. Of others it cannot be known: Inductor gives a buffer other values
    without counting a version.
    """
    setattr(cu_seqlens, _MADE, {})
    return cu_seqlens


def once(cu_seqlens: Tensor | None, what: Hashable, make: Callable[[], Any]) -> Any:
    """``make()``, or what it gave before for the same values of :func:`made_once` offsets, on the same stream."""
    made = getattr(cu_seqlens, _MADE, None)
    if made is None or cu_seqlens is None:
        return make()
    version = None if cu_seqlens.is_inference() else cu_seqlens._version
    stream = torch.cuda.current_stream(cu_seqlens.device) if cu_seqlens.is_cuda else None
    key = what, version, stream
    if key not in made:
        made[key] = make()
    return made[key]


def of_token(starts: Tensor, tokens: int) -> Tensor:
    """The document of every token: int64 ``(tokens,)``."""
    return torch.searchsorted(starts, torch.arange(tokens, device=starts.device), right=True) - 1


def cut(place: Tensor, x: Tensor) -> Tensor:
    """Offsets of the two documents into which a place, int64 ``(1,)``, cuts the one row of ``x (1, L, ...)``."""
    return torch.cat([place.new_zeros(1), place, place.new_full((1,), x.shape[1])])


def select_from(place: Tensor, x: Tensor, otherwise: float) -> Tensor:
    """``x (1, L, ...)`` from a place on, and in front of it another value."""
    tokens = torch.arange(x.shape[1], device=x.device)
    return torch.where((tokens >= place).view(-1, *(1,) * (x.ndim - 2)), x, otherwise)


def along_tokens(of_tokens: Sequence[Tensor], like: Tensor) -> Tensor:
    """``(B, ...)`` of every token as ``(B, L, ...)``; no tokens of ``like`` if there are none."""
    return torch.stack(tuple(of_tokens), 1) if of_tokens else like.new_empty((like.shape[0], 0, *like.shape[2:]))
