"""What a mixer is: an op that looks along the tokens of a document, declared once, where its op is defined.

Passes know the ops only through these declarations.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mixer:
    """``torch.ops.packc.<name>``: takes ``cu_seqlens``, ``initial_state``, ``output_final_state``; never looks ahead.

    Its first result is ``(B, L, ...)``; the second, if any, is one per document, and the third is the backward's. A
    state of zero stays zero as long as tokens add nothing to it.
    """

    name: str
    per_token: tuple[str, ...]
    """Arguments ``(B, L, ...)``."""
    enter_state: tuple[str, ...] = ()
    """Arguments of which any one, if zero at a token, keeps it out of the state: for a convolution, its window."""
    gives_zero: tuple[str, ...] = ()
    """Arguments of which any one, if zero at a token and before it, makes its result zero there, from no state on."""
    unless: tuple[str, ...] = ()
    """Arguments with which it does not."""


MIXERS: dict[str, Mixer] = {}


def declare(mixer: Mixer) -> None:
    assert mixer.name not in MIXERS, f"two declarations of {mixer.name}"
    MIXERS[mixer.name] = mixer
