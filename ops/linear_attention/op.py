"""``packc::linear_attention`` and ``packc::linear_attention_bwd``: the kernels' case without step and skip.

The forward also returns the states between chunks, flattened: see ``common/chunks.py``.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from packc.ops.common import late_states
from packc.ops.common.chunks import CHUNK, check_heads, chunk_states_length
from packc.ops.mixer import Example, Mixer
from packc.ops.registration import declare
from packc.ops.shapes import Groups
from packc.ops.summary import Late, Summary, add, decay_heads


def _forward(kernels: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    return kernels.forward(q, k, v, g, None, None, *rest, False, True)


def _backward(
    kernels: Any,
    dout: Tensor,
    dfinal_state: Tensor | None,
    chunk_states: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    *rest: Any,
) -> tuple[Tensor | None, ...]:
    dq, dk, dv, dg, _, _, dinitial_state = kernels.backward(
        dout, dfinal_state, chunk_states, q, k, v, g, None, None, *rest, False
    )
    return dq, dk, dv, dg, dinitial_state


def flops(B: int, L: int, G: int, H: int, K: int, V: int, **_: Any) -> int:
    """q k^T of every group; scores times v, q times the state, k^T v, of every head."""
    return 2 * B * L * (CHUNK * (G * K + H * V) + 2 * H * K * V)


def backward_flops(B: int, L: int, G: int, H: int, K: int, V: int, **_: Any) -> int:
    """q k^T again; of every head do v^T and the other four products of chunks, and four with states."""
    return 2 * B * L * (CHUNK * (G * K + H * (2 * V + 2 * K)) + 4 * H * K * V)


def _summary(kernels: Any, k: Tensor, v: Tensor, g: Tensor | None, begin: Tensor) -> tuple[Tensor, Tensor]:
    return kernels.summary(k, v, _per_token(g, v), None, False, begin)


def _adjoint(kernels: Any, dout: Tensor, q: Tensor, g: Tensor | None, scale: float, end: Tensor) -> Tensor:
    return kernels.adjoint(dout, q, _per_token(g, dout), scale, False, end)


def _enter(
    kernels: Any,
    results: tuple[Tensor, ...],
    entering: Tensor,
    q: Tensor,
    g: Tensor | None,
    scale: float,
    end: Tensor,
    document: Tensor,
) -> None:
    made = late_states.Made(*results)
    late_states.enter(kernels, made, entering, q, _per_token(g, made.out), scale, None, end, document)


def _leave(
    kernels: Any,
    gradients: tuple[Tensor, ...],
    leaving: Tensor,
    before: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    begin: Tensor,
) -> None:
    dk, dv, dg = gradients
    grads = late_states.Gradients(dk, dv, None if g is None else dg, None)
    late_states.leave(kernels, grads, leaving, before, k, v, _per_token(g, v), None, begin)


def _per_token(g: Tensor | None, v: Tensor) -> Tensor | None:
    return None if g is None else g.expand(v.shape[:3])


def state_flops(B: int, L: int, H: int, K: int, V: int, **_: Any) -> int:
    """k^T v of every head, forward; q^T do, backward."""
    return 2 * B * L * H * K * V


def leave_flops(**sizes: Any) -> int:
    """dS v and dS^T k of every head."""
    return 2 * state_flops(**sizes)


MIXER = declare(
    Mixer(
        "linear_attention",
        tensors={"q": "B L G K", "k": "B L G K", "v": "B L H V", "g?": "B L H | H"},
        like="v",
        options={"scale": "float"},
        state="H K V",
        enter_state=("k", "v"),
        gives_zero=("k", "v"),
        keeps={"chunk_states": chunk_states_length},
        in_state_dtype=("g",),
        groups=Groups("G", "H", "q's {G} heads do not divide v's {H}"),
        check=check_heads,
        forward=_forward,
        backward=_backward,
        example=Example({"H": 2, "G": 1, "K": 5, "V": 3}, drawn={"g": lambda x: F.logsigmoid(x + 2)}, fp32=("g",)),
        flops=flops,
        backward_flops=backward_flops,
        summary=Summary(
            takes=("k", "v", "g"),
            adjoint_takes=("q", "g", "scale"),
            transition="H",
            through=decay_heads,
            compose=add,
            summary=_summary,
            adjoint=_adjoint,
            flops=state_flops,
            adjoint_flops=state_flops,
            late=Late(
                enter_takes=("q", "g", "scale"),
                enter=_enter,
                leave_takes=("k", "v", "g"),
                leave_changes=("k", "v", "g"),
                leave=_leave,
                flops=state_flops,
                leave_flops=leave_flops,
            ),
        ),
    )
)
