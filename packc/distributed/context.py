"""``packc.sequence`` for all models that are compiled in a block."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

from packc.options import SequenceOptions, check_sequence

_NONE = SequenceOptions()
_active: contextvars.ContextVar[SequenceOptions | None] = contextvars.ContextVar("packc_sequence", default=None)


@contextlib.contextmanager
def sequence_parallel(mesh_or_group: Any, *, outputs: str = "whole", cuts: str = "tokens") -> Iterator[None]:
    """Cut the tokens of every batch over the ranks of a group, in models with ``backend="packc"`` called in this block.

    As the options ``packc.sequence``, ``packc.sequence_outputs`` and ``packc.sequence_cuts`` do for one model, which
    have precedence over it. This is for whole scripts: what is compiled belongs to the block that it was first called
    in, and torch may use it for every model of one class. It is not called in another block nor outside of any, nor in
    one if it was called outside before. Where some models are cut and others are not, pass the options.

    Args:
        mesh_or_group: a one-dimensional ``DeviceMesh`` or a process group.
        outputs: ``"whole"``: what is returned of tokens is ``(B, L, ...)``, on all ranks. ``"local"``: it is
            ``(1, T_r, ...)``, of this rank's tokens; see :func:`unshard` and :func:`cut_of`.
        cuts: whether ranks get equally many ``"tokens"`` or equal ``"work"``, by FLOPs: of those in attention, a
            document has the more the longer it is.

    Raises:
        ValueError: ``outputs`` or ``cuts`` is neither.
        RuntimeError: when a model is called that was compiled for another block.
    """
    options = SequenceOptions(mesh_or_group, outputs, cuts)
    check_sequence(options)
    token = _active.set(options)
    try:
        yield
    finally:
        _active.reset(token)


def of_block() -> SequenceOptions:
    """Of the block around; without one, no group."""
    return _active.get() or _NONE


def only_in_this_block(call: Callable[..., Any]) -> Callable[..., Any]:
    """A graph that was compiled in this block, or outside of any: elsewhere ranks would not do what is asked for."""
    mine = of_block()

    @functools.wraps(call, updated=())
    def checked(*inputs: Any) -> Any:
        if of_block() != mine:
            raise RuntimeError(
                "a model, or one of its class, that was compiled for one packc.distributed.sequence_parallel block, or"
                " for none, is called in another: pass options={'packc.sequence': ...} to torch.compile, which tells"
                " them apart"
            )
        return call(*inputs)

    return checked
