"""Sinks: of each head, ``(H,)``, or of each token and head, ``(1, T, H)``; and beside a kernel that knows none.

The share of the softmax that a sink takes is taken off such a kernel's results afterwards. With the sink in
``logsumexp``, the same kernel's backward gives the gradients of q, k and v: it makes the shares from that, and
``dout . out`` is what it is.
"""

from __future__ import annotations

import torch
from torch import Tensor


def by_head(sinks: Tensor) -> Tensor:
    """``(H, 1)`` or ``(H, T)``."""
    return sinks[:, None] if sinks.ndim == 1 else sinks[0].mT


def of_queries(sinks: Tensor | None, queries: slice) -> Tensor | None:
    """Those that some tokens see."""
    return sinks if sinks is None or sinks.ndim == 1 else sinks[:, queries]


def gradient(of_tokens: Tensor, sinks: Tensor) -> Tensor:
    """That of ``sinks``, given what each token adds to it, ``(H, T)``."""
    return of_tokens.sum(1) if sinks.ndim == 1 else of_tokens.mT[None].contiguous()


def with_sinks(out: Tensor, logsumexp: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """``out (1, T, H, V)`` and ``logsumexp (H, T)`` of the keys alone, to those of the keys and sinks."""
    both = torch.logaddexp(logsumexp, by_head(sinks).to(logsumexp.dtype))
    kept = (logsumexp - both).exp().mT[None, ..., None]
    return (out * kept).to(out.dtype), both


def by_token(dout: Tensor, out: Tensor, logsumexp: Tensor, sinks: Tensor) -> Tensor:
    """What each token adds to it: ``-p_sink (dout . out)``. ``logsumexp`` has the sinks."""
    shares = (by_head(sinks).to(logsumexp.dtype) - logsumexp).exp()
    return -shares * (dout[0].to(logsumexp.dtype) * out[0]).sum(-1).mT
