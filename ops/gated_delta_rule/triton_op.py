"""The Triton kernels, imported when they are first wanted: for q, k, v and dout of one dtype."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from packc.ops.gated_delta_rule import triton_backward, triton_forward, triton_summary
from packc.ops.tritonsrc.operands import alike


def forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = alike(q, k, v)
    return triton_forward.forward(q, k, v, *rest)


def backward(
    dout: Tensor, dfinal_state: Tensor | None, chunk_states: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor | None, ...]:
    dout, q, k, v = alike(dout, q, k, v)
    return triton_backward.backward(dout, dfinal_state, chunk_states, q, k, v, *rest)


def summary(k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    k, v = alike(k, v)
    return triton_summary.summary(k, v, *rest)


def adjoint(dout: Tensor, q: Tensor, k: Tensor, *rest: Any) -> Tensor:
    dout, q, k = alike(dout, q, k)
    return triton_summary.adjoint(dout, q, k, *rest)
