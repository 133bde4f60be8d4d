"""Linear attention's summary and adjoint on Triton: what carries states between chunks, of the segment and the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from packc.ops import documents
from packc.ops.common.chunks import chunk_states_shape
from packc.ops.common.triton_chunks import chunks_of, countable
from packc.ops.linear_attention.triton_forward import key_major
from packc.ops.linear_attention.triton_states import carry_states


def summary(
    k: Tensor, v: Tensor, g: Tensor | None, step: Tensor | None, value_major: bool, begin: Tensor
) -> tuple[Tensor, Tensor]:
    state = _carry(k, v, g, step, 1.0, value_major, begin, reverse=False)[1:]
    decays = state.new_zeros((1, v.shape[2])) if g is None else documents.select_from(begin, g, 0).sum(1)
    return decays, state.clone()


def adjoint(dout: Tensor, q: Tensor, g: Tensor | None, scale: float, value_major: bool, end: Tensor) -> Tensor:
    return _carry(q, dout, g, None, scale, value_major, end, reverse=True)[:1].clone()


def _carry(
    x: Tensor,
    y: Tensor,
    g: Tensor | None,
    step: Tensor | None,
    scale: float,
    value_major: bool,
    place: Tensor,
    reverse: bool,
) -> Tensor:
    """Of the two documents into which ``place`` cuts the row; arguments are ``carry_states``'."""
    x, y, g, step = countable(x, y, g, step)
    chunks = chunks_of(documents.cut(place, y), y)
    heads, K, V = y.shape[2], x.shape[3], y.shape[3]
    states = y.new_empty((2, heads, *((V, K) if value_major else (K, V))), dtype=torch.float32)
    kept = y.new_empty(chunk_states_shape(x, y), dtype=torch.float32)
    carry_states(x, y, g, step, scale, chunks, None, key_major(states, value_major), kept, reverse)
    return states
