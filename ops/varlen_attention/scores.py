"""Scores of attention in plain torch: capped, with biases by distance, and with a sink beside those of the keys.

Heads come first: scores ``(H, t, s)`` of queries and keys, and what their gradient is a gradient of.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from packc.ops.varlen_attention.sinks import by_head


class Scores(NamedTuple):
    values: Tensor
    """-inf where a query does not see a key."""
    slope: Tensor | float
    """Of a score, by ``q . k``."""


def scores(
    q: Tensor, k: Tensor, scale: float, softcap: float | None, bias: Tensor | None, back: Tensor, visible: Tensor
) -> Scores:
    """
    Args:
        bias: ``(H, t, R)``: of each query, what is added to its score with the key so many tokens before it.
        back: ``(t, s)``: how many tokens a key is before a query.
    """
    values = q @ k.mT * scale
    slope: Tensor | float = scale
    if softcap is not None:
        share = (values / softcap).tanh()
        values, slope = softcap * share, scale * (1 - share.square())
    if bias is not None:
        near, distance = _near(back, bias.shape[-1])
        values = values + bias.gather(-1, distance.expand(*values.shape)).masked_fill(~near, 0)
    return Scores(values.masked_fill(~visible, -torch.inf), slope)


def gradient_of_bias(dscores: Tensor, bias: Tensor, back: Tensor) -> Tensor:
    near, distance = _near(back, bias.shape[-1])
    return torch.zeros_like(bias).scatter_add(-1, distance.expand(*dscores.shape), dscores.masked_fill(~near, 0))


def _near(back: Tensor, R: int) -> tuple[Tensor, Tensor]:
    return (back >= 0) & (back < R), back.clamp(0, R - 1)


class Shares(NamedTuple):
    of_keys: Tensor
    """``(H, t, s)``."""
    of_sink: Tensor | None
    """``(H, t)``."""
    logsumexp: Tensor
    """``(H, t)``, with the sink's."""


def softmax(values: Tensor, sinks: Tensor | None) -> Shares:
    """``sinks``: those that these queries see."""
    if sinks is None:
        return Shares(values.softmax(-1), None, values.logsumexp(-1))
    joined = torch.cat([values, by_head(sinks).expand(values.shape[:2])[..., None]], -1)
    shares = joined.softmax(-1)
    return Shares(shares[..., :-1], shares[..., -1], joined.logsumexp(-1))
