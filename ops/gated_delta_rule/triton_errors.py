"""What tokens wanted corrected, again, and what the outputs want of the corrections: the backward's first part."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from packc.ops.common.triton_chunks import chunk_of, load_between, load_tile, state_strides, token_strides
from packc.ops.common.triton_products import dot_computed, dot_fp32
from packc.ops.gated_delta_rule.triton_gates import load_dense, pair_tile_transposed, store_dense
from packc.ops.linear_attention.triton_states import block_of
from packc.ops.tritonsrc.launch import launch, taken


@triton.jit(do_not_specialize=["tokens", "slots", "dout_b"])
def _recompute_errors(
    dout,
    readers,  # (rows, tokens, heads, K)
    pairs,  # of queries
    table,
    kept,
    initial,
    errors,  # (rows, tokens, heads, V): but for what the states say; then all; or None, and none of what they are of
    du,  # (rows, tokens, heads, V)
    scale,
    tokens,
    heads,
    slots,
    K,
    V,
    WIDE_V,
    dout_b,
    dout_strides,
    initial_strides,
    PACKED: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row, document, token, length, first, _ = chunk_of(table, PACKED)
    if length > 0:
        head, first_v = tl.program_id(1).to(tl.int64), tl.program_id(2) * BLOCK_V
        slot = row * slots + token // CHUNK - 1
        entering = slot, document, first, head, heads, initial_strides
        if errors is not None:
            error = load_dense(errors, row, token, head, tokens, heads, length, first_v, V, CHUNK, BLOCK_V)
            for first_k in tl.range(0, K, BLOCK_K, disable_licm=True):  # what is hoisted out of it would spill
                keys = load_dense(readers, row, token, head, tokens, heads, length, first_k, K, CHUNK, BLOCK_K)
                state = load_between(kept, initial, entering, first_k, first_v, K, V, WIDE_V, BLOCK_K, BLOCK_V)
                error -= dot_fp32(keys, state, PRECISION)
            store_dense(errors, error, row, token, head, tokens, heads, length, first_v, V, CHUNK, BLOCK_V)

        gradients = load_tile(dout, row, token, head, length, dout_b, dout_strides, first_v, V, CHUNK, BLOCK_V)
        weights = tl.load(pair_tile_transposed(pairs, tl.program_id(0), head, heads, 0, CHUNK, CHUNK))
        result = dot_computed(weights * scale, gradients, PRECISION)
        store_dense(du, result, row, token, head, tokens, heads, length, first_v, V, CHUNK, BLOCK_V)


def recompute_errors(
    dout: Tensor,
    readers: Tensor | None,
    errors: Tensor | None,
    pairs: Tensor,
    initial: Tensor | None,
    kept: Tensor | None,
    scale: float,
    shared: dict[str, Any],
) -> Tensor:
    """du ``(B, L, H, V)``, but for what states want; completes ``errors``, if there are any."""
    du = dout.new_empty(dout.shape, dtype=torch.float32)
    V = dout.shape[3]
    block_v = block_of(V, torch.float32)
    launch(
        _recompute_errors,
        (shared["table"].shape[0], shared["heads"], triton.cdiv(V, block_v)),
        dout=dout,
        readers=readers,
        pairs=pairs,
        kept=kept,
        initial=initial,
        errors=errors,
        du=du,
        scale=float(scale),
        slots=0 if kept is None else kept.shape[1],
        V=V,
        WIDE_V=0 if kept is None else kept.shape[4],
        BLOCK_K=block_of(shared["K"], torch.float32),
        BLOCK_V=block_v,
        **taken(_recompute_errors, shared),
        **token_strides(dout=dout),
        **state_strides(initial=initial),
        num_warps=4,
        num_stages=1,
    )
    return du
