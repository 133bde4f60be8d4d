"""The causal convolution in plain torch: the specification. fp32 arithmetic, fp64 for fp64 inputs.

Documents are laid out one after another, each behind the W - 1 rows of its history (its initial state, or zeros). In
that layout the convolution is W shifted products, no tap can reach another document, and a final state is simply the
last W - 1 rows of a document, however short it is.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from packc.ops import documents
from packc.ops.mixer import state_dtype


class _Layout(NamedTuple):
    """Rows of the layout above: of every token, and of every document's history and final state."""

    tokens: Tensor  # (B * L,)
    history: Tensor  # (N * (W - 1),)
    final: Tensor  # (N * (W - 1),)


def _layout(x: Tensor, cu_seqlens: Tensor | None, W: int) -> _Layout:
    starts = documents.offsets(cu_seqlens, x)
    tokens, N = x.shape[0] * x.shape[1], len(starts) - 1
    token, row, n = (torch.arange(size, device=x.device) for size in (tokens, W - 1, N + 1))
    before = starts + n * (W - 1)  # the row at which each document's history begins
    return _Layout(
        tokens=token + (documents.of_token(starts, tokens) + 1) * (W - 1),
        history=(before[:-1, None] + row).flatten(),
        final=(before[1:, None] - (W - 1) + row).flatten(),
    )


def _rows(layout: _Layout, x: Tensor, initial_state: Tensor | None) -> Tensor:
    tokens = rearrange(x, "b l d -> (b l) d")
    if initial_state is None:
        history = x.new_zeros(len(layout.history), x.shape[2])
    else:
        history = rearrange(initial_state, "n d w -> (n w) d").to(x.dtype)
    return torch.cat([tokens, history])[torch.cat([layout.tokens, layout.history]).argsort()]


def _preactivation(layout: _Layout, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    W = weight.shape[1]
    taps = (weight[:, k] * rows[layout.tokens - (W - 1) + k] for k in range(W))
    return sum(taps, rows.new_zeros(()) if bias is None else bias)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor]:
    (B, _, D), W = x.shape, weight.shape[1]
    wide_x, wide_weight, wide_bias = _wide(x, weight, bias, initial_state)
    layout = _layout(x, cu_seqlens, W)
    rows = _rows(layout, wide_x, initial_state)
    out = _preactivation(layout, rows, wide_weight, wide_bias)
    if activation is not None:
        out = F.silu(out)
    final_state = rows.new_empty(0, D, W - 1)
    if output_final_state:
        N = documents.count(cu_seqlens, x)
        final_state = rearrange(rows[layout.final], "(n w) d -> n d w", n=N, w=W - 1).contiguous()
    return rearrange(out, "(b l) d -> b l d", b=B, d=D).to(x.dtype), final_state


def backward(
    dout: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor | None, ...]:
    (B, _, D), W = x.shape, weight.shape[1]
    wide_x, wide_weight, wide_bias = _wide(x, weight, bias, initial_state)
    layout = _layout(x, cu_seqlens, W)
    rows = _rows(layout, wide_x, initial_state)
    dpre = rearrange(dout.to(rows.dtype), "b l d -> (b l) d")
    if activation is not None:
        pre = _preactivation(layout, rows, wide_weight, wide_bias)
        s = torch.sigmoid(pre)
        dpre = dpre * s * (1 + pre * (1 - s))
    drows, dweights = torch.zeros_like(rows), []
    for k in range(W):
        tap = layout.tokens - (W - 1) + k
        dweights.append((dpre * rows[tap]).sum(0))
        drows = drows.index_add(0, tap, dpre * wide_weight[:, k])  # every row once, so the order of the sum is fixed
    dweight = torch.stack(dweights, 1)
    if dfinal_state is not None:
        # Documents' last rows do not overlap either.
        drows = drows.index_add(0, layout.final, rearrange(dfinal_state.to(drows.dtype), "n d w -> (n w) d"))
    dx = rearrange(drows[layout.tokens], "(b l) d -> b l d", b=B, d=D).to(x.dtype)
    dbias = None if bias is None else dpre.sum(0)
    dinitial_state = None
    if initial_state is not None:
        N = documents.count(cu_seqlens, x)
        dinitial_state = rearrange(drows[layout.history], "(n w) d -> n d w", n=N, w=W - 1).contiguous()
    return dx, dweight, dbias, dinitial_state


def _wide(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    dtype = state_dtype(x, weight, bias, initial_state)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
