"""torch's flash attention for CPUs, called once for every run of documents of one length.

It takes no offsets, but documents are independent: a call for each, some 80 us beside its work, and equally long
neighbours are a batch without a copy. A window is walked in blocks of queries, each with the keys its queries see.
"""

from collections.abc import Iterator
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from packc.ops import documents
from packc.ops.varlen_attention.layout import positive, readable
from packc.private_torch import private_torch

# What scaled_dot_product_attention calls, and its backward: private, but only they hand out the logsumexp. Their
# schemas may move: tests/ops/test_varlen_attention_torch.py says when they move.
with private_torch():
    _flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    _flash_bwd = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

_BLOCK = 256  # queries; the mask of a block is (256, 255 + window)


class _Piece(NamedTuple):
    """Queries ``[a, b)`` and keys ``[c, d)`` of each of ``n`` documents of ``L`` tokens, the first at ``begin``."""

    begin: int
    n: int
    L: int
    a: int
    b: int
    c: int
    d: int

    def queries(self, tensor: Tensor) -> Tensor:
        """Those of ``(T, H, ...)``: a view ``(n, H, b - a, ...)``."""
        return self._documents(tensor)[:, self.a : self.b].transpose(1, 2)

    def keys(self, tensor: Tensor) -> Tensor:
        """Those of ``(T, G, ...)``: a view ``(n, G, d - c, ...)``."""
        return self._documents(tensor)[:, self.c : self.d].transpose(1, 2)

    def _documents(self, tensor: Tensor) -> Tensor:
        return tensor[self.begin : self.begin + self.n * self.L].unflatten(0, (self.n, self.L))


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool, scale: float | None, window: int | None
) -> tuple[Tensor, Tensor]:
    (_, T, H, K), V = q.shape, v.shape[3]
    out, logsumexp = q.new_empty(1, T, H, V), q.new_empty(H, T, dtype=torch.float32)
    q, scale, _ = positive(q, scale)
    q, k, v = readable(q, k, v, size=max(K, V))
    masks = _Masks(causal, window, q.dtype)
    for piece in _pieces(cu_seqlens, q, causal, window):
        mask = masks.of(piece)
        part, part_logsumexp = _flash(
            piece.queries(q[0]),
            piece.keys(k[0]),
            piece.keys(v[0]),
            is_causal=causal and mask is None,
            attn_mask=mask,
            scale=scale,
        )
        piece.queries(out[0]).copy_(part[..., :V])
        piece.queries(logsumexp.T).copy_(part_logsumexp)
    return out, logsumexp


def varlen_attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cu_seqlens: Tensor,
    causal: bool,
    scale: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    K, V = q.shape[3], v.shape[3]
    # Keys belong to several blocks of a window: their gradients are summed, in fp32.
    sums = torch.float32 if window is not None else q.dtype
    dq, dk, dv = q.new_empty(q.shape), k.new_zeros(k.shape, dtype=sums), v.new_zeros(v.shape, dtype=sums)
    q, scale, sign = positive(q, scale)
    dout, q, k, v, out = readable(dout, q, k, v, out, size=max(K, V))
    masks = _Masks(causal, window, torch.float32)
    for piece in _pieces(cu_seqlens, q, causal, window):
        mask = masks.of(piece)
        # In fp32 whatever the dtype: for bf16 and fp16 that took a tenth to a half of the time (torch 2.13, AVX2,
        # documents of 16 to 512 tokens), copies included, and it is more exact.
        parts = _flash_bwd(
            piece.queries(dout[0]).float(),
            piece.queries(q[0]).float(),
            piece.keys(k[0]).float(),
            piece.keys(v[0]).float(),
            piece.queries(out[0]).float(),
            piece.queries(logsumexp.T),
            dropout_p=0.0,
            is_causal=causal and mask is None,
            attn_mask=mask,
            scale=scale,
        )
        piece.queries(dq[0]).copy_(parts[0][..., :K] * sign)
        if mask is None:
            piece.keys(dk[0]).copy_(parts[1][..., :K])
            piece.keys(dv[0]).copy_(parts[2][..., :V])
        else:
            piece.keys(dk[0]).add_(parts[1][..., :K])
            piece.keys(dv[0]).add_(parts[2][..., :V])
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _pieces(cu_seqlens: Tensor, q: Tensor, causal: bool, window: int | None) -> Iterator[_Piece]:
    starts = documents.offsets(cu_seqlens, q).tolist()
    begin = 0
    for L, run in groupby(end - start for start, end in pairwise(starts)):
        n = sum(1 for _ in run)
        step = L if window is None or window >= L else _BLOCK
        for a in range(0, L, step or 1):
            b = min(a + step, L)
            if window is None:
                yield _Piece(begin, n, L, a, b, 0, L)
            else:
                yield _Piece(begin, n, L, a, b, max(0, a - window + 1), b if causal else min(b + window - 1, L))
        begin += n * L


class _Masks:
    """What to add to scores where a window ends inside a document; made once for all pieces of a shape."""

    def __init__(self, causal: bool, window: int | None, dtype: torch.dtype) -> None:
        self._causal, self._window, self._dtype = causal, window, dtype
        self._made: dict[tuple[int, int, int], Tensor] = {}

    def of(self, piece: _Piece) -> Tensor | None:
        """``(b - a, d - c)``: 0 where a query sees a key, -inf elsewhere. None if the window holds the document."""
        if self._window is None or self._window >= piece.L:
            return None
        # The last: the column that is a row's own token, in the first row.
        rows, columns, diagonal = shape = piece.b - piece.a, piece.d - piece.c, piece.a - piece.c
        if shape not in self._made:
            hidden = torch.ones(rows, columns, dtype=torch.bool)
            ahead = 1 if self._causal else self._window
            hidden = hidden.triu(diagonal + ahead) | hidden.tril(diagonal - self._window)
            self._made[shape] = torch.zeros(rows, columns, dtype=self._dtype).masked_fill(hidden, -torch.inf)
        return self._made[shape]
