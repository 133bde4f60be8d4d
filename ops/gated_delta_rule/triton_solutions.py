"""``(1 + R beta) x`` of all chunks on Triton, and its transpose: what the resolvents are for.

Neither knows the states. So keys that read a state are solved for as values are, and what stays sequential has no
system to solve:

    e = (1 + R beta) (v - S^T (from_start k)) = (1 + R beta) v - S^T ((1 + R beta) from_start k)
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from packc.ops.common.triton_chunks import chunk_of, load_per_token, load_tile, token_strides
from packc.ops.common.triton_products import dot_fp32, from_start, log_decays
from packc.ops.gated_delta_rule.triton_gates import (
    Gate,
    channels_from_start,
    load_dense,
    pair_tile,
    pair_tile_transposed,
    store_dense,
)
from packc.ops.linear_attention.triton_states import block_of
from packc.ops.tritonsrc.launch import autotuned, launch, taken


def _columns(channels: int, dtype: torch.dtype) -> int:
    """Of a program, that registers hold."""
    return 16 if dtype == torch.float32 else min(32, block_of(channels, dtype))


@autotuned([triton.Config({}, num_warps=4, num_stages=1)], key=["channels"])
@triton.jit(do_not_specialize=["rows", "tokens", "x_b", "g_b", "beta_b"])
def _solve(
    x,  # (rows, tokens, groups, channels)
    g,
    sums,
    beta,
    resolvents,
    table,
    solved,  # (rows, tokens, heads, channels)
    rows,
    tokens,
    heads,
    groups,
    channels,
    x_b,
    x_strides,
    g_b,
    g_strides,
    beta_b,
    beta_strides,
    PACKED: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, _, token, length, _, _ = chunk_of(table, PACKED)
    if length > 0:
        head, first = tl.program_id(1).to(tl.int64), tl.program_id(2) * BLOCK
        group = head // (heads // groups)
        value = load_tile(x, row, token, group, length, x_b, x_strides, first, channels, CHUNK, BLOCK)
        value = value.to(tl.float32)
        if g is not None:
            coarse, fine = log_decays(load_per_token(g, row, token, head, length, g_b, g_strides, CHUNK))
            value *= from_start(coarse, fine)[:, None]
        if sums is not None:
            value *= channels_from_start(
                sums, row, token, head, rows, tokens, heads, length, first, channels, CHUNK, BLOCK
            )
        factor = load_per_token(beta, row, token, head, length, beta_b, beta_strides, CHUNK)[:, None]
        resolvent = tl.load(pair_tile(resolvents, tl.program_id(0), head, heads, 0, CHUNK, CHUNK))
        value += dot_fp32(resolvent, factor * value, PRECISION)
        store_dense(solved, value, row, token, head, tokens, heads, length, first, channels, CHUNK, BLOCK)


@triton.jit(do_not_specialize=["tokens", "beta_b"])
def _solve_transposed(
    du,  # (rows, tokens, heads, V); then l
    beta,
    resolvents,
    table,
    dv,  # the same
    tokens,
    heads,
    V,
    beta_b,
    beta_strides,
    PACKED: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, _, token, length, _, _ = chunk_of(table, PACKED)
    if length > 0:
        head, first = tl.program_id(1).to(tl.int64), tl.program_id(2) * BLOCK
        value = load_dense(du, row, token, head, tokens, heads, length, first, V, CHUNK, BLOCK)
        factor = load_per_token(beta, row, token, head, length, beta_b, beta_strides, CHUNK)[:, None]
        resolvent = tl.load(pair_tile_transposed(resolvents, tl.program_id(0), head, heads, 0, CHUNK, CHUNK))
        value += dot_fp32(resolvent, factor * value, PRECISION)
        store_dense(du, value, row, token, head, tokens, heads, length, first, V, CHUNK, BLOCK)
        store_dense(dv, factor * value, row, token, head, tokens, heads, length, first, V, CHUNK, BLOCK)


def solve(x: Tensor, gate: Gate | None, beta: Tensor, resolvents: Tensor, shared: dict[str, Any]) -> Tensor:
    """fp32 ``(B, L, H, channels)``, of v; or of keys and a gate, with what is left in them of what enters the chunk."""
    rows, tokens, groups, channels = x.shape
    heads = shared["heads"]
    solved = x.new_empty((rows, tokens, heads, channels), dtype=torch.float32)
    block = _columns(channels, x.dtype)
    launch(
        _solve,
        (shared["table"].shape[0], heads, triton.cdiv(channels, block)),
        x=x,
        beta=beta,
        resolvents=resolvents,
        solved=solved,
        channels=channels,
        BLOCK=block,
        **(gate or Gate(None, None)).arguments(),
        **taken(_solve, shared | {"groups": groups}),
        **token_strides(x=x, beta=beta),
    )
    return solved


def solve_transposed(
    du: Tensor, dtype: torch.dtype, beta: Tensor, resolvents: Tensor, shared: dict[str, Any]
) -> Tensor:
    """dv, in ``dtype``; du ``(B, L, H, V)`` becomes l."""
    V = du.shape[3]
    dv = torch.empty_like(du, dtype=dtype)
    block = _columns(V, dtype)
    launch(
        _solve_transposed,
        (shared["table"].shape[0], shared["heads"], triton.cdiv(V, block)),
        du=du,
        beta=beta,
        resolvents=resolvents,
        dv=dv,
        V=V,
        BLOCK=block,
        **taken(_solve_transposed, shared),
        **token_strides(beta=beta),
        num_warps=4,
        num_stages=1,
    )
    return dv
