"""Sinks beside a kernel that knows none: the share of the softmax that a sink takes, taken off its results afterwards.

With the sink in ``logsumexp``, the same kernel's backward gives the gradients of q, k and v: it makes the shares from
that, and ``dout . out`` is what it is.
"""

from __future__ import annotations

import torch
from torch import Tensor


def with_sinks(out: Tensor, logsumexp: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """``out (1, T, H, V)`` and ``logsumexp (H, T)`` of the keys alone, to those of the keys and ``sinks (H,)``."""
    both = torch.logaddexp(logsumexp, sinks[:, None].to(logsumexp.dtype))
    kept = (logsumexp - both).exp().mT[None, ..., None]
    return (out * kept).to(out.dtype), both


def gradient(dout: Tensor, out: Tensor, logsumexp: Tensor, sinks: Tensor) -> Tensor:
    """Of ``sinks``: ``-sum p_sink (dout . out)``. ``logsumexp`` has them."""
    shares = (sinks[:, None].to(logsumexp.dtype) - logsumexp).exp()
    inner = (dout[0].to(logsumexp.dtype) * out[0]).sum(-1).mT
    return -(shares * inner).sum(1)
