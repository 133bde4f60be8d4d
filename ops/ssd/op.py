"""``packc::ssd`` and ``packc::ssd_bwd``, by linear attention's kernels.

``dt`` is as it enters the recurrence: what makes it positive is left to the compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from packc.ops import dispatch, summary
from packc.ops.common import late_states
from packc.ops.common.chunks import chunk_states_length
from packc.ops.common.silu import silu_slope
from packc.ops.linear_attention import op as linear_attention
from packc.ops.mixer import Example, Mixer
from packc.ops.registration import declare
from packc.ops.shapes import Groups
from packc.ops.summary import Late, Summary, add, decay_heads


def _as_attention(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None) -> tuple[Any, ...]:
    """q, k, v, g, step, skip and scale."""
    skip = None if D is None else (D if D.ndim == 2 else D.unsqueeze(1).expand(-1, x.shape[3])).to(dt.dtype)
    return C, B, x, dt * A, dt, None if skip is None else skip.contiguous(), 1.0


def _forward(
    kernels: Any,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    out, final_state, chunk_states = kernels.forward(
        *_as_attention(x, dt, A, B, C, D), cu_seqlens, initial_state, output_final_state, True, z is None
    )
    return out if z is None else out * _silu(z.to(out.dtype)), final_state, chunk_states


def _silu(x: Tensor) -> Tensor:
    return _gate("silu", F.silu, x)


def _gate(name: str, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    alike = dispatch.choose("linear_attention", x) == "cpu"
    return getattr(torch.ops.packc_cpu, name)(x.contiguous()) if alike else plain(x)


def _backward(
    kernels: Any,
    dout: Tensor,
    dfinal_state: Tensor | None,
    chunk_states: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor | None, ...]:
    attention = (*_as_attention(x, dt, A, B, C, D), cu_seqlens, initial_state)
    dz = None
    if z is not None:
        # y, in front of the gate, is computed again: out divided by the gate would not give it back.
        y, _, _ = kernels.forward(*attention, False, True, False)
        gate, dout = z.to(y.dtype), dout.to(y.dtype)
        dz = (dout * y * _gate("silu_slope", silu_slope, gate)).contiguous()
        dout = dout * _silu(gate)
    dC, dB, dx, dg, dstep, dD, dinitial_state = kernels.backward(dout, dfinal_state, chunk_states, *attention, True)
    if D is not None and D.ndim == 1:
        dD = dD.sum(1)
    return dx, dg * A + dstep, (dg * dt).sum((0, 1)), dB, dC, dD, dz, dinitial_state


def _summary(kernels: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, begin: Tensor) -> tuple[Tensor, Tensor]:
    return kernels.summary(B, x, dt * A, dt, True, begin)


def _adjoint(kernels: Any, dout: Tensor, dt: Tensor, A: Tensor, C: Tensor, z: Tensor | None, end: Tensor) -> Tensor:
    if end.is_cpu:  # nothing is gated, then, that nobody wants
        dout, dt, C = (x[:, : int(end)] for x in (dout, dt, C))
        z = None if z is None else z[:, : int(end)]
    if z is not None:
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        dout = dout * _silu(z)
    return kernels.adjoint(dout, C, dt * A, 1.0, True, end)


def _enter(
    kernels: Any,
    results: tuple[Tensor, ...],
    entering: Tensor,
    dt: Tensor,
    A: Tensor,
    C: Tensor,
    z: Tensor | None,
    end: Tensor,
    document: Tensor,
) -> None:
    out, final_state, chunk_states = results
    made = late_states.Made(out, final_state.mT, chunk_states)
    if summary.on_host(end):
        dt = dt[:, : int(end)]
    late_states.enter(kernels, made, entering.mT, C, dt * A, 1.0, z, end, document)


def _leave(
    kernels: Any,
    gradients: tuple[Tensor, ...],
    leaving: Tensor,
    before: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    begin: Tensor,
) -> None:
    dx, ddt, dA, dB = gradients
    dg, dstep = torch.zeros_like(dt), torch.zeros_like(dt)
    grads = late_states.Gradients(dB, dx, dg, dstep)
    late_states.leave(kernels, grads, leaving.mT, before.mT, B, x, dt * A, dt, begin)
    ddt += dg * A + dstep
    dA += (dg * dt).sum((0, 1))


# As attention has it, groups and heads are those of q and v, keys are N and values P.
def _chunk_states(B: int, L: int, H: int, P: int, N: int, **_: Any) -> int:
    return chunk_states_length(B, L, H, K=N, V=P)


def _flops(B: int, L: int, G: int, H: int, P: int, N: int, **_: Any) -> int:
    return linear_attention.flops(B, L, G, H, K=N, V=P)


def _backward_flops(B: int, L: int, G: int, H: int, P: int, N: int, **_: Any) -> int:
    return linear_attention.backward_flops(B, L, G, H, K=N, V=P)


def _state_flops(B: int, L: int, H: int, P: int, N: int, **_: Any) -> int:
    return linear_attention.state_flops(B, L, H, K=N, V=P)


MIXER = declare(
    Mixer(
        "ssd",
        tensors={
            "x": "B L H P",
            "dt": "B L H",
            "A": "H",
            "B": "B L N | B L G N",
            "C": "B L N | B L G N",
            "D?": "H P | H",
            "z?": "B L H P",
        },
        before={"dt_bias": "H"},
        like="x",
        state="H P N",
        enter_state=("x", "dt", "B"),
        gives_zero=("x",),
        keeps={"chunk_states": _chunk_states},
        in_state_dtype=("dt", "A"),
        groups=Groups("G", "H", "B's {G} groups do not divide x's {H} heads"),
        kernels="linear_attention",
        forward=_forward,
        backward=_backward,
        example=Example(
            {"H": 2, "G": 1, "P": 3, "N": 5},
            drawn={"A": lambda x: -torch.exp(x / 2), "dt_bias": lambda x: x - 1},
            forms={"B": "B L G N", "C": "B L G N", "D": "H"},
            options={"dt_softplus": True, "dt_limit": (0.01, 2.0)},
            fp32=("A", "D", "dt_bias"),
        ),
        flops=_flops,
        backward_flops=_backward_flops,
        summary=Summary(
            takes=("x", "dt", "A", "B"),
            adjoint_takes=("dt", "A", "C", "z"),
            transition="H",
            through=decay_heads,
            compose=add,
            summary=_summary,
            adjoint=_adjoint,
            flops=_state_flops,
            adjoint_flops=_state_flops,
            late=Late(
                enter_takes=("dt", "A", "C", "z"),
                enter=_enter,
                leave_takes=("x", "dt", "A", "B"),
                leave_changes=("x", "dt", "A", "B"),
                leave=_leave,
                flops=_state_flops,
                leave_flops=lambda **sizes: 2 * _state_flops(**sizes),
            ),
        ),
    )
)
