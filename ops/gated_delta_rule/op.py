"""``packc::gated_delta_rule`` and ``packc::gated_delta_rule_bwd``.

The forward also returns the states between chunks, flattened: see ``common/chunks.py``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from packc.ops.common.chunks import CHUNK, check_heads, chunk_states_length
from packc.ops.mixer import Example, Mixer
from packc.ops.registration import declare
from packc.ops.shapes import Groups
from packc.ops.summary import Summary


def _flops(B: int, L: int, G: int, H: int, K: int, V: int, **_: Any) -> int:
    """k k^T and q k^T of every group; of every head two products of chunks with values, and three with the state."""
    return 2 * B * L * (CHUNK * 2 * (G * K + H * V) + 3 * H * K * V)


def _backward_flops(B: int, L: int, G: int, H: int, K: int, V: int, **_: Any) -> int:
    """Both of keys again; of every head five products of chunks with values, four with keys, and seven with states."""
    return 2 * B * L * (CHUNK * (2 * G * K + H * (5 * V + 4 * K)) + 7 * H * K * V)


def _summary_flops(B: int, L: int, G: int, H: int, K: int, V: int, **_: Any) -> int:
    """k k^T of every group; of every head one product of chunks with values, two with the state, of V and K columns."""
    return 2 * B * L * (CHUNK * (G * K + H * (V + K)) + 2 * H * K * (V + K))


def _adjoint_flops(B: int, L: int, G: int, H: int, K: int, V: int, **_: Any) -> int:
    """k k^T and q k^T of every group; of every head two products of chunks with values, and three with the state."""
    return 2 * B * L * (CHUNK * 2 * (G * K + H * V) + 3 * H * K * V)


MIXER = declare(
    Mixer(
        "gated_delta_rule",
        tensors={"q": "B L G K", "k": "B L G K", "v": "B L H V", "g": "B L H | B L H K", "beta": "B L H"},
        like="v",
        options={"scale": "float"},
        state="H K V",
        enter_state=("k", "v", "beta"),
        gives_zero=("k", "v", "beta"),
        keeps={"chunk_states": chunk_states_length},
        in_state_dtype=("g", "beta"),
        groups=Groups("G", "H", "q's {G} heads do not divide v's {H}"),
        check=check_heads,
        example=Example(
            {"H": 2, "G": 1, "K": 5, "V": 3},
            # Keys that are not normalised let states grow without bound.
            drawn={
                "k": lambda x: F.normalize(x, dim=-1),
                "g": lambda x: F.logsigmoid(x + 2),
                "beta": torch.sigmoid,
            },
            fp32=("g",),
        ),
        flops=_flops,
        backward_flops=_backward_flops,
        summary=Summary(
            takes=("k", "v", "g", "beta"),
            adjoint_takes=("q", "k", "g", "beta", "scale"),
            # Products of fp32 as precise as torch is told to make them: exact unless somebody has asked for TF32.
            transition="H K K",
            through=lambda transition, state, _: transition @ state,
            through_flops=lambda K, **_: 2 * K,
            transposed=lambda transition, dstate, _: transition.mT @ dstate,
            compose=lambda first, second: second @ first,
            flops=_summary_flops,
            adjoint_flops=_adjoint_flops,
        ),
    )
)
