"""The scan's backward on Triton: what is launched. Formulas and kernels are in ``triton_walk_back``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from packc.ops.selective_scan.reference import CHUNK, Gradients
from packc.ops.selective_scan.triton_forward import (
    enter_rows,
    prepare,
    states_of_empty_documents,
)
from packc.ops.selective_scan.triton_segments import pass_states
from packc.ops.selective_scan.triton_tokens import padded_tokens, tokens_last
from packc.ops.selective_scan.triton_walk_back import TILES, edges, walk_back
from packc.ops.tritonsrc.launch import launch, taken
from packc.ops.tritonsrc.tokens import countable, strides, wide

# Channels of a program: a thread has four, which share the shuffles of sums over channels. Where documents have states
# of their own, registers are short.
_BLOCK_D, _BLOCK_D_STATES = 128, 64
_CHANNELS = 1024  # of programs that a processor has registers for


def backward(
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
) -> Gradients:
    """In fp32 where parts are added up, else in the arguments' dtypes."""
    u, delta, dout, z = countable(u, delta, dout, z)
    packed = cu_seqlens is not None
    own_states = packed and (initial_state is not None or dfinal_state is not None)
    block_d = _BLOCK_D_STATES if own_states else _BLOCK_D
    p = prepare(u, A, B, cu_seqlens, block_d, _CHANNELS // block_d)
    D, delta_bias, initial_state, dfinal_state = (
        None if x is None else x.contiguous() for x in (D, delta_bias, initial_state, dfinal_state)
    )
    du, dz = u.new_empty(u.shape), None if z is None else z.new_empty(z.shape)
    ddelta = _empty_delta(delta, channel_first_ddelta)
    dinitial = None if initial_state is None else states_of_empty_documents(u, A, cu_seqlens, dfinal_state)

    def partial_sums(*shape: int) -> Tensor:
        return u.new_empty((p.rows, p.segments, *shape), dtype=torch.float32)

    arriving, dA = partial_sums(p.states, p.channels), partial_sums(p.states, p.channels)
    dD = None if D is None else partial_sums(p.channels)
    dbias = None if delta_bias is None else partial_sums(p.channels)
    padded = padded_tokens(p.tokens)
    by_block = (p.blocks, p.rows, p.states, padded)
    dB, dC = (u.new_empty(by_block, dtype=torch.float32) for _ in range(2))
    if p.tokens > 0:
        enter_rows(arriving[:, -1], None if packed else dfinal_state)
        shared: dict[str, Any] = {**p.sizes, "padded": padded, **strides(delta=delta, dout=dout, z=z)}
        shared |= {"SOFTPLUS": delta_softplus, "PACKED": packed, "WIDE": wide(u, delta, dout, z), "BLOCK_D": block_d}
        shared |= {"dout": dout, "dfinal_state": dfinal_state, "delta": delta, "A": p.A, "C": tokens_last(C), "z": z}
        shared |= {"delta_bias": delta_bias, "document": p.document}
        grid = (p.rows * p.segments * p.blocks,)
        if p.segments > 1:
            carry, total = partial_sums(p.states, p.channels), partial_sums(p.channels)
            launch(edges, grid, **taken(edges, shared), carry=carry, total=total)
            pass_states(carry, total, p.A, p.document, arriving, p.tokens, p.segment, reverse=True)
        leaving = torch.empty_like(arriving)
        launch(
            walk_back,
            grid,
            **shared,
            **strides(u=u, ddelta=ddelta),
            chunk_states=chunk_states,
            u=u,
            B=tokens_last(B),
            D=D,
            initial_state=initial_state,
            arriving=arriving,
            carry=leaving,
            tile_states=u.new_empty((p.rows, p.segments, TILES, p.states, p.channels), dtype=torch.float32),
            du=du,
            ddelta=ddelta,
            dz=dz,
            dA=dA,
            dB=dB,
            dC=dC,
            dD=dD,
            ddelta_bias=dbias,
            dinitial_state=dinitial,
            rows=p.rows,
            CHUNK=CHUNK,
            TILES=TILES,
        )
        if dinitial is not None and not packed:
            dinitial = leaving[:, 0].transpose(1, 2)

    return Gradients(
        u=du,
        delta=ddelta,
        A=dA.sum((0, 1)).t().contiguous(),
        B=_over_blocks(dB, B),
        C=_over_blocks(dC, C),
        D=None if dD is None else dD.sum((0, 1)),
        z=dz,
        delta_bias=None if dbias is None else dbias.sum((0, 1)),
        initial_state=None if dinitial is None else dinitial.contiguous(),
    )


def _empty_delta(delta: Tensor, channel_first: bool) -> Tensor:
    if not channel_first:
        return delta.new_empty(delta.shape)
    rows, tokens, channels = delta.shape
    return delta.new_empty((rows, channels, tokens)).transpose(1, 2)


def _over_blocks(partial: Tensor, x: Tensor) -> Tensor:
    """From ``(blocks, rows, N, padded L)`` to the gradient of B or C."""
    groups = x.shape[2] if x.ndim == 4 else 1
    partial = partial[..., : x.shape[1]]
    summed = partial.unflatten(0, (groups, -1)).sum(1) if groups else partial.new_zeros((0, *partial.shape[1:]))
    return summed.permute(1, 3, 0, 2).reshape(x.shape).contiguous()
