"""``packc::selective_scan`` and ``packc::selective_scan_bwd``.

The forward also returns the state that enters every chunk of 64 tokens of a row; the backward computes the others
again, chunk by chunk. They are (B, ceil(L / 64), N, D), flattened: tracing an axis of ceil(L / 64) would guard on
whether it is one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from packc.ops.mixer import Example, Mixer
from packc.ops.registration import declare
from packc.ops.selective_scan.reference import CHUNK
from packc.ops.shapes import Groups
from packc.ops.summary import Arguments, Summary, add


def _chunk_states(B: int, L: int, D: int, N: int, **_: Any) -> int:
    return B * ((L + CHUNK - 1) // CHUNK) * N * D


def _flops(B: int, L: int, D: int, N: int, **_: Any) -> int:
    """For each token, channel and state: delta A and its exp, x B, the recurrence (2), C . h (2)."""
    return 7 * B * L * D * N


def _backward_flops(B: int, L: int, D: int, N: int, **_: Any) -> int:
    """The forward again; dh (2), dB (2), dC (2), B . dh (2), the decay of dh, g, dA (2) and A . g (2)."""
    return 21 * B * L * D * N


def _decay(steps: Tensor, state: Tensor, arguments: Arguments) -> Tensor:
    A = arguments["A"]
    assert A is not None
    return torch.exp(steps[..., None] * A.to(state.dtype)) * state


def _state_flops(B: int, L: int, D: int, N: int, **_: Any) -> int:
    """For each token, channel and state: delta A and its exp, x B (dy C, backward), the recurrence (2)."""
    return 5 * B * L * D * N


MIXER = declare(
    Mixer(
        "selective_scan",
        tensors={
            "u": "B L D",
            "delta": "B L D",
            "A": "D N",
            "B": "B L N | B L G N",
            "C": "B L N | B L G N",
            "D?": "D",
            "z?": "B L D",
            "delta_bias?": "D",
        },
        like="u",
        options={"delta_softplus": "bool"},
        state="D N",
        enter_state=("u", "B"),
        gives_zero=("u",),
        keeps={"chunk_states": _chunk_states},
        groups=Groups("G", "D", "B's G = {G} groups do not divide u's D = {D} channels"),
        # The projection that made it takes the gradient without a copy.
        own_layout=("delta",),
        example=Example(
            {"D": 3, "N": 2, "G": 1},
            drawn={"A": lambda x: -torch.exp(x / 2), "delta_bias": lambda x: x - 1},
            options={"delta_softplus": True},
            fp32=("A", "D", "delta_bias"),
        ),
        flops=_flops,
        backward_flops=_backward_flops,
        summary=Summary(
            takes=("u", "delta", "A", "B", "delta_bias", "delta_softplus"),
            adjoint_takes=("delta", "A", "C", "z", "delta_bias", "delta_softplus"),
            # The sum of the steps: of decays, which are exponentials of A times that, there would be N as many.
            transition="D",
            through=_decay,
            through_takes=("A",),
            through_flops=lambda **_: 3,
            compose=add,
            flops=_state_flops,
            adjoint_flops=_state_flops,
        ),
    )
)
