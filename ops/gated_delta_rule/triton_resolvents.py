"""The matrices R = -M (1 + beta M)^-1 of all chunks on Triton, M what tokens are to earlier ones (``csrc``'s header).

Tokens on their own have R = 0. From the R of two neighbouring blocks, i and an earlier j, follows that of both together
by products of matrices no larger than R is (where the powers of M, whose series is R, grow and cancel):

    C = M_ij + M_ij beta_j R_jj,   R_ij = -(C + R_ii beta_i C)
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from packc.ops.common.triton_chunks import HALF, chunk_of, load_per_token, token_strides
from packc.ops.common.triton_products import dot_fp32, fp32_products
from packc.ops.gated_delta_rule.triton_channels import meets
from packc.ops.tritonsrc.launch import launch, taken

HALF_LEVELS = tl.constexpr(5)


@triton.jit
def _resolve_half(products, factor, PRECISION: tl.constexpr):
    """All pairs of blocks of one size at once."""
    result = tl.where(meets(1, HALF), -products, 0.0)
    for level in range(1, HALF_LEVELS):
        corner = tl.where(meets(1 << level, HALF), products, 0.0)
        rest = corner + dot_fp32(corner, factor * result, PRECISION)
        result -= rest + dot_fp32(result, factor * rest, PRECISION)
    return result


@triton.jit(do_not_specialize=["beta_b"])
def _resolve(
    pairs,
    beta,
    table,
    heads,
    beta_b,
    beta_strides,
    PACKED: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row, _, token, length, _, _ = chunk_of(table, PACKED)
    if length > 0:
        head = tl.program_id(1).to(tl.int64)
        t = tl.arange(0, HALF)
        at = pairs + (tl.program_id(0).to(tl.int64) * heads + head) * CHUNK * CHUNK
        at += t[:, None] * CHUNK + t[None, :]
        factor = load_per_token(beta, row, token, head, length, beta_b, beta_strides, HALF)[:, None]
        first = _resolve_half(tl.load(at), factor, PRECISION)
        tl.store(at, first)
        if length > HALF:
            at += HALF * CHUNK
            corner = tl.load(at)
            rest = corner + dot_fp32(corner, factor * first, PRECISION)
            factor = load_per_token(beta, row, token + HALF, head, length - HALF, beta_b, beta_strides, HALF)[:, None]
            second = _resolve_half(tl.load(at + HALF), factor, PRECISION)
            tl.store(at, -rest - dot_fp32(second, factor * rest, PRECISION))
            tl.store(at + HALF, second)


def resolve(pairs: Tensor, beta: Tensor, shared: dict[str, Any]) -> Tensor:
    """In place of M ``(chunks, H, CHUNK, CHUNK)``; beta is fp32 ``(B, L, H)``."""
    launch(
        _resolve,
        tuple(pairs.shape[:2]),
        pairs=pairs,
        beta=beta,
        # Errors grow from step to step.
        **taken(_resolve, shared | {"PRECISION": fp32_products(torch.float32)}),
        **token_strides(beta=beta),
        num_warps=2,
    )
    return pairs
