"""Dtypes of the operands of products."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In one dtype: Triton multiplies bf16 by bf16 as it is, everything else in fp32."""
    common = functools.reduce(torch.promote_types, (x.dtype for x in tensors))
    return tuple(x.to(common) for x in tensors)
