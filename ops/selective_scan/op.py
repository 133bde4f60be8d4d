"""``packc::selective_scan`` and ``packc::selective_scan_bwd``: schemas, fakes, FLOPs and autograd.

The forward also returns the state that enters every chunk of 64 tokens of a row; the backward computes the others
again, chunk by chunk. They are (B, ceil(L / 64), N, D), flattened: tracing an axis of ceil(L / 64) would guard on
whether it is one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from packc.ops import derivatives, dispatch, documents
from packc.ops.flops import flop_formula
from packc.ops.mixer import Mixer, declare
from packc.ops.selective_scan import cpu, reference

_lib = torch.library.Library("packc", "FRAGMENT")
_lib.define(
    "selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "bool delta_softplus, Tensor? cu_seqlens, Tensor? initial_state, bool output_final_state) "
    "-> (Tensor out, Tensor final_state, Tensor chunk_states)"
)
# ddelta's layout is an argument: strides of a traced delta need not be those of a later run.
_lib.define(
    "selective_scan_bwd(Tensor dout, Tensor? dfinal_state, Tensor chunk_states, Tensor u, Tensor delta, Tensor A, "
    "Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, bool delta_softplus, Tensor? cu_seqlens, "
    "Tensor? initial_state, bool channel_first_ddelta) "
    "-> (Tensor du, Tensor ddelta, Tensor dA, Tensor dB, Tensor dC, Tensor dD, Tensor dz, Tensor ddelta_bias, "
    "Tensor dinitial_state)"
)
declare(Mixer("selective_scan", per_token=("u", "delta", "B", "C", "z"), enter_state=("u", "B"), gives_zero=("u",)))


def _choose(u: Tensor, *others: Tensor | None) -> str:
    # One fp64 argument makes fp64 states, which are the reference's.
    wide = reference.state_dtype(u, *others) == torch.float64
    return "reference" if wide else dispatch.choose(cpu.NAME, u)


# ---- forward ---------------------------------------------------------------------------------------------------------


def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    choice = _choose(u, delta, A, B, C, D, z, delta_bias, initial_state)
    run = cpu.forward if choice == "cpu" else reference.forward
    if choice == "triton":
        from packc.ops.selective_scan.triton_forward import forward as run
    return run(u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens, initial_state, output_final_state)


def _forward_fake(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = reference.state_dtype(u, delta, A, B, C, D, z, delta_bias, initial_state)
    states = documents.count(cu_seqlens, u) if output_final_state else 0
    chunks = (u.shape[1] + reference.CHUNK - 1) // reference.CHUNK
    return (
        u.new_empty(u.shape),
        u.new_empty((states, *A.shape), dtype=dtype),
        u.new_empty((u.shape[0] * chunks * A.shape[1] * A.shape[0],), dtype=dtype),
    )


# ---- backward --------------------------------------------------------------------------------------------------------


def _backward(
    dout: Tensor,
    dfinal_state: Tensor | None,
    chunk_states: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    channel_first_ddelta: bool,
) -> tuple[Tensor, ...]:
    arguments = (u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens, initial_state)
    choice = _choose(u, *arguments[1:8], initial_state)
    if choice != "reference":
        run = cpu.backward
        if choice == "triton":
            from packc.ops.selective_scan.triton_backward import backward as run
        return run(dout, dfinal_state, chunk_states, *arguments, channel_first_ddelta)
    grads = reference.backward(dout, dfinal_state, *arguments)
    ddelta = grads.delta.transpose(1, 2).contiguous().transpose(1, 2) if channel_first_ddelta else grads.delta
    return tuple(u.new_empty(0) if grad is None else grad for grad in grads._replace(delta=ddelta))


def _backward_fake(
    dout: Tensor,
    dfinal_state: Tensor | None,
    chunk_states: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    channel_first_ddelta: bool,
) -> tuple[Tensor, ...]:
    rows, tokens, channels = delta.shape
    if channel_first_ddelta:
        ddelta = delta.new_empty((rows, channels, tokens)).transpose(1, 2)
    else:
        ddelta = delta.new_empty(delta.shape)
    return (u.new_empty(u.shape), ddelta, *(_grad_like(x, u) for x in (A, B, C, D, z, delta_bias, initial_state)))


def _grad_like(x: Tensor | None, u: Tensor) -> Tensor:
    """Contiguous, in the argument's own dtype; empty for an absent argument."""
    return u.new_empty(0) if x is None else x.new_empty(x.shape)


for _key in ("CPU", "CUDA"):
    _lib.impl("selective_scan", _forward, _key)
    _lib.impl("selective_scan_bwd", _backward, _key)
torch.library.register_fake("packc::selective_scan", _forward_fake, lib=_lib)
torch.library.register_fake("packc::selective_scan_bwd", _backward_fake, lib=_lib)


# ---- FLOPs, for each token, channel and state ------------------------------------------------------------------------


@flop_formula(torch.ops.packc.selective_scan)
def _forward_flops(
    u_shape: Any, delta_shape: Any, A_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """delta A and its exp, x B, the recurrence (2), C . h (2)."""
    batch, tokens, channels = u_shape
    return 7 * batch * tokens * channels * A_shape[1]


@flop_formula(torch.ops.packc.selective_scan_bwd)
def _backward_flops(
    dout_shape: Any,
    dfinal_shape: Any,
    chunk_shape: Any,
    u_shape: Any,
    delta_shape: Any,
    A_shape: Any,
    *args: Any,
    **kwargs: Any,
) -> int:
    """The forward again; dh (2), dB (2), dC (2), B . dh (2), the decay of dh, g, dA (2) and A . g (2)."""
    batch, tokens, channels = u_shape
    return 21 * batch * tokens * channels * A_shape[1]


# ---- autograd --------------------------------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens, initial_state, output_final_state = inputs
    chunk_states = output[2]
    ctx.save_for_backward(chunk_states, u, delta, A, B, C, D, z, delta_bias, cu_seqlens, initial_state)
    ctx.delta_softplus, ctx.output_final_state = delta_softplus, output_final_state
    ctx.mark_non_differentiable(chunk_states)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dout: Tensor | None, dfinal_state: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    chunk_states, u, delta, A, B, C, D, z, delta_bias, cu_seqlens, initial_state = ctx.saved_tensors
    if dout is None:
        dout = u.new_zeros(u.shape)
    du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state = torch.ops.packc.selective_scan_bwd.default(
        dout,
        dfinal_state if ctx.output_final_state else None,
        chunk_states,
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        ctx.delta_softplus,
        cu_seqlens,
        initial_state,
        # As delta lies in memory: the projection that made it takes the gradient without a copy.
        statically_known_true(delta.stride(1) == 1) and not statically_known_true(delta.stride(2) == 1),
    )
    return (
        du,
        ddelta,
        dA,
        dB,
        dC,
        None if D is None else dD,
        None if z is None else dz,
        None if delta_bias is None else ddelta_bias,
        None,
        None,
        None if initial_state is None else dinitial_state,
        None,
    )


derivatives.register(_lib, "selective_scan", _forward, _setup_context, _autograd)
derivatives.register_gradients(_lib, "selective_scan_bwd", _backward)
