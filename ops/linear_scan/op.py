"""``packc::linear_scan`` and ``packc::linear_scan_bwd``. Kernels know three axes: rows, tokens, channels.

The forward also returns the states that leave every whole chunk of 16 tokens of a row, ``(B, L // 16, ...)`` flattened;
the backward computes the others again, chunk by chunk.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from packc.ops.linear_scan.reference import CHUNK
from packc.ops.mixer import Example, Mixer
from packc.ops.registration import declare
from packc.ops.summary import Summary, multiply


def _forward(
    kernels: Any, a: Tensor, b: Tensor, cu_seqlens: Tensor | None, initial: Tensor | None, output_final_state: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if b.ndim == 3:
        return kernels.forward(a, b, cu_seqlens, _states(initial), output_final_state)
    out, final, kept = kernels.forward(_tokens(a), _tokens(b), cu_seqlens, _states(initial), output_final_state)
    return out.view(b.shape), final.view(final.shape[0], *b.shape[2:]), kept


def _backward(
    kernels: Any,
    dout: Tensor,
    dfinal: Tensor | None,
    kept: Tensor,
    a: Tensor,
    b: Tensor,
    cu_seqlens: Tensor | None,
    initial: Tensor | None,
) -> tuple[Tensor | None, ...]:
    initials, dfinals = _states(initial), _states(dfinal)
    if b.ndim == 3:
        return kernels.backward(dout, dfinals, kept, a, b, cu_seqlens, initials)
    da, db, dinitial = kernels.backward(_tokens(dout), dfinals, kept, _tokens(a), _tokens(b), cu_seqlens, initials)
    return da.view(a.shape), db.view(b.shape), None if initial is None else dinitial.view(initial.shape)


def _summary(kernels: Any, a: Tensor, b: Tensor, begin: Tensor) -> tuple[Tensor, Tensor]:
    transition, state = kernels.summary(_tokens(a), _tokens(b), begin)
    return transition.view(1, *b.shape[2:]), state.view(1, *b.shape[2:])


def _adjoint(kernels: Any, dout: Tensor, a: Tensor, end: Tensor) -> Tensor:
    return kernels.adjoint(_tokens(dout), _tokens(a), end).view(1, *dout.shape[2:])


def _tokens(x: Tensor) -> Tensor:
    """``(B, L, channels)``: a view wherever there can be one."""
    return x.flatten(2) if x.ndim > 2 else x.unsqueeze(2)


def _states(state: Tensor | None) -> Tensor | None:
    """``(documents, channels)``, contiguous, as small things are."""
    if state is None:
        return None
    return (state.flatten(1) if state.ndim > 1 else state.unsqueeze(1)).contiguous()


MIXER = declare(
    Mixer(
        "linear_scan",
        tensors={"a": "B L *D", "b": "B L *D"},
        like="b",
        state="*D",
        enter_state=("b",),
        gives_zero=("b",),
        keeps={"chunk_states": lambda B, L, D: B * (L // CHUNK) * prod(D)},
        forward=_forward,
        backward=_backward,
        example=Example({"D": (21,)}, drawn={"a": lambda x: torch.sigmoid(x + 2)}),
        flops=lambda B, L, D: 2 * B * L * prod(D),
        # The recurrence again (2), dh (2) and da.
        backward_flops=lambda B, L, D: 5 * B * L * prod(D),
        summary=Summary(
            takes=("a", "b"),
            adjoint_takes=("a",),
            transition="*D",
            through=lambda transition, state, _: transition * state,
            compose=multiply,
            summary=_summary,
            adjoint=_adjoint,
            # The recurrence (2) and the product.
            flops=lambda B, L, D: 3 * B * L * prod(D),
            adjoint_flops=lambda B, L, D: 2 * B * L * prod(D),
        ),
    )
)
