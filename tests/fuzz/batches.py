"""Batches for a random model: padding of every kind, sizes of any."""

from __future__ import annotations

import random
from collections.abc import Iterable

import torch
from torch import Tensor

from fuzz.program import Input

KINDS = ("right", "left", "both", "holes", "empty row", "full", "one token", "mixed", "mixed", "other values")


def make_inputs(inputs: Iterable[Input], sizes: tuple[int, int], kind: str, seed: int) -> dict[str, Tensor]:
    """An input each, with padding of one of ``KINDS``; reproducible."""
    made: dict[str, Tensor] = {}
    for each in inputs:
        draw = random.Random(f"{seed} {each.name}")
        scope = {"B": sizes[0], "L": sizes[1]}
        shape = [eval(axis.size, {}, scope) for axis in each.axes]
        generator = torch.Generator().manual_seed(draw.randrange(2**31))
        if each.kind == "mask":
            mask = padding(*sizes, kind, draw)
            made[each.name] = mask.to(each.dtype)
        elif each.kind in ("ids", "index"):
            made[each.name] = torch.randint(0, each.bound, shape, generator=generator)
        elif each.kind == "labels":
            made[each.name] = _labels(shape, each.bound, made, draw, generator)
        else:
            scale = 0.6 if each.kind in ("parameter", "buffer") else 1.0
            made[each.name] = scale * torch.randn(shape, generator=generator, dtype=each.dtype)
    return made


def padding(batch: int, length: int, kind: str, draw: random.Random) -> Tensor:
    """(B, L), 1 at tokens."""
    rows = []
    for row in range(batch):
        own = draw.choice(KINDS[:5]) if kind == "mixed" else kind
        start, end = 0, length
        if own in ("left", "both"):
            start = draw.randrange(length)
        if own in ("right", "both", "other values"):
            end = draw.randint(start + 1, length)
        tokens = [int(start <= place < end) for place in range(length)]
        if own == "holes":
            tokens = [draw.choice((0, 1, 1)) for _ in range(length)]
        if own == "empty row" and row == draw.randrange(batch):
            tokens = [0] * length
        if own == "one token":
            tokens = [0] * length
            tokens[draw.randrange(length)] = int(row == 0 or draw.random() < 0.7)
        if own == "other values":
            tokens = [2 * each if draw.random() < 0.2 else each for each in tokens]
        rows.append(tokens)
    return torch.tensor(rows).view(batch, length)


def _labels(
    shape: list[int], bound: int, made: dict[str, Tensor], draw: random.Random, generator: torch.Generator
) -> Tensor:
    """Ignored at padding, most of the time; and some tokens' too."""
    labels = torch.randint(0, bound, shape, generator=generator)
    mask = next((value for name, value in made.items() if name == "attention_mask"), None)
    if mask is not None and draw.random() < 0.85:
        labels = labels.masked_fill(mask == 0, -100)
    if draw.random() < 0.4:
        labels = labels.masked_fill(torch.rand(shape, generator=generator) < 0.3, -100)
    return labels
