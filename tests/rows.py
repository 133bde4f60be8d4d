"""Rows that hold several documents, and what of each is right: the model's results on the document alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import packc

TAPS = 4
TWO_ROWS = [[3, 5, 1], [9]]


class Mixed(nn.Module):
    """A convolution, a scan and attention, with positions that the model counts by itself."""

    def __init__(self, vocab: int = 32, hidden: int = 8, *, slope: float = 0.0) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, hidden)
        self.positions = nn.Embedding(64, hidden)
        self.taps = nn.Parameter(torch.randn(hidden, TAPS) / 2)
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.head = nn.Linear(hidden, vocab)
        self.slope = slope

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        h = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        h = h if mask is None else h * mask[..., None]
        h = packc.ops.causal_conv1d(h, self.taps, activation="silu")
        h = packc.ops.linear_scan(torch.sigmoid(h), h if mask is None else h * mask[..., None])
        q, k, v = (each.unflatten(-1, (2, -1)).transpose(1, 2) for each in self.qkv(h).chunk(3, -1))
        places = torch.arange(ids.shape[1])
        distance = (places[:, None] - places) * self.slope if self.slope else None
        attended = F.scaled_dot_product_attention(q, k, v, distance, is_causal=not self.slope)
        h = h + attended.transpose(1, 2).flatten(2)
        return self.head(h)


def offsets(lengths: list[int]) -> torch.Tensor:
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()


def numbers(rows: list[list[int]]) -> torch.Tensor:
    """``seq_idx`` of rows of documents of these lengths."""
    return torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows]).int()


def positions(rows: list[list[int]]) -> torch.Tensor:
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])


def by(way: str, rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Arguments of ``packc.documents``."""
    flat = [length for row in rows for length in row]
    values = {
        "cu_seqlens": lambda: offsets(flat),
        "seq_idx": lambda: numbers(rows),
        "position_ids": lambda: positions(rows),
    }
    return {way: values[way]()}


WAYS = ("cu_seqlens", "seq_idx", "position_ids")


def pieces(rows: list[list[int]]) -> list[tuple[int, int, int]]:
    """Row, start and end of every document."""
    found = []
    for number, row in enumerate(rows):
        start = 0
        for length in row:
            found.append((number, start, start + length))
            start += length
    return found


def tokens(rows: list[list[int]]) -> torch.Tensor:
    return torch.randint(0, 32, (len(rows), sum(rows[0])))


def compiled(model: Callable[..., Any], **options: Any) -> Any:
    return torch.compile(model, backend=packc.backend, options={"packc.inner": "aot_eager", **options})


def mix(x: torch.Tensor) -> torch.Tensor:
    return packc.ops.causal_conv1d(x, torch.ones(4, 3))


def alone(model, ids: torch.Tensor, rows: list[list[int]]) -> torch.Tensor:
    """What the model makes of each document by itself, put back where it is in its row."""
    parts = [[model(ids[n : n + 1, a:b]) for n, a, b in pieces(rows) if n == row] for row in range(len(rows))]
    return torch.cat([torch.cat(row, 1) for row in parts])


def assert_documents_are_apart(model: Callable[..., Any], x: torch.Tensor, *, options: dict[str, Any]) -> None:
    """``x (2, 8, ...)``, of whose rows the first has three documents: no value, and no gradient, crosses them."""
    rows, x = [[3, 4, 1], [8]], x.requires_grad_()
    with packc.documents(**by("cu_seqlens", rows)):
        out = torch.compile(model, backend=packc.backend, options=options)(x)
    torch.testing.assert_close(out, alone(model, x, rows))
    (dx,) = torch.autograd.grad(out[0, 3:7].sum(), x)
    others = torch.ones(2, 8, dtype=torch.bool)
    others[0, 3:7] = False
    assert dx[others].eq(0).all()
