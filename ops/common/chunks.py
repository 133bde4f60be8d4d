"""Chunks of linear attention, SSD and the delta rule: what their declarations and references say of them alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from packc.ops import documents

CHUNK = 64
"""The state that enters every chunk of so many tokens of a document, but the first, is kept for the backward."""


def check_heads(op: str, tensors: Mapping[str, Tensor], cu_seqlens: Tensor | None) -> None:
    for name in ("q", "v"):
        if tensors[name].ndim != 4:
            raise ValueError(f"{op}: {name} must be (B, L, heads, channels), not {tuple(tensors[name].shape)}")


def chunk_states_shape(k: Tensor, v: Tensor) -> tuple[int, ...]:
    """Of the states that enter chunks of a document but its first, at the chunk's first token // 64 - 1.

    Documents are cut into chunks from their own beginnings, so no two of those chunks begin in the same 64 tokens. Rows
    of V are padded to whole 16s, for vectors to fit. There is always a slot: traced, none would be another case.
    """
    rows, tokens, heads, V = v.shape
    return (rows, (tokens + CHUNK - 1) // CHUNK, heads, k.shape[3], (V + 15) // 16 * 16)


def chunk_states_length(B: int, L: int, H: int, K: int, V: int, **_: Any) -> int:
    """Of all of them, flattened."""
    return B * ((L + CHUNK - 1) // CHUNK) * H * K * ((V + 15) // 16 * 16)


def chunk_states(kept: Mapping[int, Tensor], k: Tensor, v: Tensor) -> Tensor:
    """Those ``kept`` at their places of ``chunk_states_shape``, flattened; not differentiable."""
    rows, slots, *state = chunk_states_shape(k, v)
    zeros = v.new_zeros((rows, *state))
    padding = state[-1] - v.shape[3]
    padded = [F.pad(kept[n].detach(), (0, padding)) if n in kept else zeros for n in range(slots)]
    return documents.along_tokens(padded, zeros.unsqueeze(1)).flatten()
