"""``packc::ssd`` and ``packc::ssd_bwd``: schemas, fakes, FLOPs and autograd over linear attention's kernel.

``dt`` is as it enters the recurrence: what makes it positive is left to the compiler.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from packc.ops import derivatives, dispatch, documents
from packc.ops.flops import flop_formula
from packc.ops.linear_attention import kernels, reference
from packc.ops.linear_attention.op import backward_flops, forward_flops
from packc.ops.mixer import Mixer, declare
from packc.ops.selective_scan.reference import silu_slope

_lib = torch.library.Library("packc", "FRAGMENT")
_lib.define(
    "ssd(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? cu_seqlens, "
    "Tensor? initial_state, bool output_final_state) -> (Tensor out, Tensor final_state, Tensor chunk_states)"
)
_lib.define(
    "ssd_bwd(Tensor dout, Tensor? dfinal_state, Tensor chunk_states, Tensor x, Tensor dt, Tensor A, Tensor B, "
    "Tensor C, Tensor? D, Tensor? z, Tensor? cu_seqlens, Tensor? initial_state) "
    "-> (Tensor dx, Tensor ddt, Tensor dA, Tensor dB, Tensor dC, Tensor dD, Tensor dz, Tensor dinitial_state)"
)
declare(Mixer("ssd", per_token=("x", "dt", "B", "C", "z"), enter_state=("x", "dt", "B"), gives_zero=("x",)))


def _as_attention(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, float]:
    """q, k, v, g, step, skip and scale."""
    # One fp64 argument makes fp64 states, and those of attention depend on neither of these.
    if any(each is not None and each.dtype == torch.float64 for each in (D, z)):
        dt = dt.double()
    skip = None if D is None else (D if D.ndim == 2 else D.unsqueeze(1).expand(-1, x.shape[3]))
    return C, B, x, dt * A, dt, skip, 1.0


def _forward(
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
        *_as_attention(x, dt, A, B, C, D, z),
        cu_seqlens,
        initial_state,
        output_final_state,
        value_major=True,
        round_out=z is None,
    )
    return out if z is None else (out * _silu(z.to(out.dtype))).to(x.dtype), final_state, chunk_states


def _silu(x: Tensor) -> Tensor:
    alike = dispatch.choose("linear_attention", x) == "cpu"
    return torch.ops.packc_cpu.silu(x.contiguous()) if alike else F.silu(x)


def _forward_fake(
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
    dtype = reference.state_dtype(x, dt, A, B, C, D, z, initial_state)
    states = documents.count(cu_seqlens, x) if output_final_state else 0
    return (
        x.new_empty(x.shape),
        x.new_empty((states, x.shape[2], x.shape[3], B.shape[3]), dtype=dtype),
        x.new_empty((math.prod(reference.chunk_states_shape(B, x)),), dtype=dtype),
    )


def _backward(
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
) -> tuple[Tensor, ...]:
    attention = _as_attention(x, dt, A, B, C, D, z)
    dz = None
    if z is not None:
        # y, in front of the gate, is computed again: out divided by the gate would not give it back.
        y, _, _ = kernels.forward(*attention, cu_seqlens, initial_state, False, value_major=True, round_out=False)
        gate, dout = z.to(y.dtype), dout.to(y.dtype)
        dz = (dout * y * silu_slope(gate)).to(z.dtype)
        dout = dout * _silu(gate)
    grads = kernels.backward(dout, dfinal_state, chunk_states, *attention, cu_seqlens, initial_state, value_major=True)
    assert grads.g is not None
    assert grads.step is not None
    dD = grads.skip
    if D is not None and dD is not None and D.ndim == 1:
        dD = dD.sum(1)
    return (
        grads.v,
        (grads.g * A + grads.step).to(dt.dtype),
        (grads.g * dt).sum((0, 1)).to(A.dtype),
        grads.k,
        grads.q,
        x.new_empty(0) if D is None or dD is None else dD.to(D.dtype),
        x.new_empty(0) if dz is None else dz.contiguous(),
        x.new_empty(0) if grads.initial_state is None else grads.initial_state,
    )


def _backward_fake(
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
) -> tuple[Tensor, ...]:
    inputs = (x, dt, A, B, C, D, z, initial_state)
    return tuple(x.new_empty(0) if each is None else each.new_empty(each.shape) for each in inputs)


for _key in ("CPU", "CUDA"):
    _lib.impl("ssd", _forward, _key)
    _lib.impl("ssd_bwd", _backward, _key)
torch.library.register_fake("packc::ssd", _forward_fake, lib=_lib)
torch.library.register_fake("packc::ssd_bwd", _backward_fake, lib=_lib)


@flop_formula(torch.ops.packc.ssd)
def _forward_flops(
    x_shape: Any, dt_shape: Any, A_shape: Any, B_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return forward_flops(B_shape, x_shape)


@flop_formula(torch.ops.packc.ssd_bwd)
def _backward_flops(
    dout_shape: Any,
    dfinal_shape: Any,
    states_shape: Any,
    x_shape: Any,
    dt_shape: Any,
    A_shape: Any,
    B_shape: Any,
    *args: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    return backward_flops(B_shape, x_shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.output_final_state = inputs
    ctx.save_for_backward(output[2], *tensors)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dout: Tensor | None, dfinal_state: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    chunk_states, x, dt, A, B, C, D, z, cu_seqlens, initial_state = ctx.saved_tensors
    dx, ddt, dA, dB, dC, dD, dz, dinitial_state = torch.ops.packc.ssd_bwd.default(
        x.new_zeros(x.shape) if dout is None else dout,
        dfinal_state if ctx.output_final_state else None,
        chunk_states,
        x,
        dt,
        A,
        B,
        C,
        D,
        z,
        cu_seqlens,
        initial_state,
    )
    return (
        dx,
        ddt,
        dA,
        dB,
        dC,
        None if D is None else dD,
        None if z is None else dz,
        None,
        None if initial_state is None else dinitial_state,
        None,
    )


derivatives.register(_lib, "ssd", _forward, _setup_context, _autograd)
derivatives.register_gradients(_lib, "ssd_bwd", _backward)
