"""What stands, while a mask is tried, for inputs that are neither padding nor positions: token ids, say, or biases."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from packc.passes.mask_graphs import Fill, MaskGraph

_LARGEST_BIAS = 1e7
"""Far from where a bias hides what it is added to."""


def fills(made: MaskGraph) -> list[Fill]:
    """Numbers in a row, of either sign, all of one kind, and about each with which the graph may compare them."""
    return [_zeros, *(_others(made) if made.others else ())]


def _others(made: MaskGraph) -> Iterator[Fill]:
    yield _ones
    yield _random
    for number in sorted(made.numbers()):
        if abs(number) < _LARGEST_BIAS:
            yield _around(number)


def _around(number: float) -> Fill:
    def fill(shape: list[int], dtype: torch.dtype, which: int) -> Tensor:
        if dtype.is_floating_point:
            return (number * (4 * _drawn(shape, which) - 2)).to(dtype)
        # That number and its neighbours, each as soon as there are three.
        near = (torch.arange(_drawn(shape, which).numel()) + which) % 3 + int(number) - 1
        return near.view(shape).to(dtype) if dtype != torch.bool else _random(shape, dtype, which)

    return fill


def _zeros(shape: list[int], dtype: torch.dtype, which: int) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def _ones(shape: list[int], dtype: torch.dtype, which: int) -> Tensor:
    return torch.ones(shape, dtype=dtype)


def _random(shape: list[int], dtype: torch.dtype, which: int) -> Tensor:
    values = _drawn(shape, which)
    if dtype == torch.bool:
        return values > 0.5
    # Numbers of either sign; positions within a row.
    return (values * 8 - 4 if dtype.is_floating_point else values * max([1, *shape])).to(dtype)


def _drawn(shape: list[int], which: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1 + which))
