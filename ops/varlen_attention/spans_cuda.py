"""Attention within spans on CUDA: torch's flash attention where their form is its own, the reference elsewhere.

Flash attention takes documents end to end, and says where queries are among their keys: the last ones of a document are
side by side. So it is with what one rank has of a causal document that is cut.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from packc.ops.varlen_attention import cuda, sinks, spans_reference
from packc.ops.varlen_attention.cuda import Lengths
from packc.ops.varlen_attention.document_mask import once_per_batch


class Run(NamedTuple):
    """Spans whose queries lie end to end, and whose keys do."""

    queries: slice
    keys: slice
    lengths: Lengths


def attention_spans(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    relative_bias: Tensor | None,
    spans: Tensor,
    causal: bool,
    scale: float,
    window: int | None,
    dropout_p: float,
    seed: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    plain = not dropout_p and relative_bias is None and softcap is None
    runs = _runs_of_flash(q, v, spans, causal, window) if plain else None
    if runs is None:
        options = spans, causal, scale, window, dropout_p, seed, softcap
        return spans_reference.attention_spans(q, k, v, sink, relative_bias, *options)
    _, T, H, _ = q.shape
    out, logsumexp = q.new_zeros(1, T, H, v.shape[3]), q.new_zeros(H, T, dtype=torch.float32)
    for queries, keys, lengths in runs:
        found = cuda.flash(q[:, queries], k[:, keys], v[:, keys], lengths, causal, scale, window)
        own = sinks.of_queries(sink, queries)
        found = found if own is None else sinks.with_sinks(*found, own)
        out[:, queries], logsumexp[:, queries] = found
    return out, logsumexp


def attention_spans_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    relative_bias: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    spans: Tensor,
    causal: bool,
    scale: float,
    window: int | None,
    dropout_p: float,
    seed: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    plain = not dropout_p and relative_bias is None and softcap is None
    runs = _runs_of_flash(q, v, spans, causal, window) if plain else None
    if runs is None:
        kept = out, logsumexp, spans, causal, scale, window, dropout_p, seed, softcap
        return spans_reference.attention_spans_bwd(dout, q, k, v, sink, relative_bias, *kept)
    dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
    dsinks = torch.zeros_like(logsumexp)
    for queries, keys, lengths in runs:
        given = (dout[:, queries], q[:, queries], k[:, keys], v[:, keys], out[:, queries])
        of_run = logsumexp[:, queries].contiguous()
        found = cuda.flash_bwd(*given, of_run, lengths, causal, scale, window)
        dq[:, queries], dk[:, keys], dv[:, keys] = found
        own = sinks.of_queries(sink, queries)
        if own is not None:
            dsinks[:, queries] = sinks.by_token(dout[:, queries], out[:, queries], of_run, own)
    return dq, dk, dv, None if sink is None else sinks.gradient(dsinks, sink), None


def _runs_of_flash(q: Tensor, v: Tensor, spans: Tensor, causal: bool, window: int | None) -> list[Run] | None:
    if not cuda.takes_flash(q, v):
        return None
    placed = causal or window is not None
    return once_per_batch(spans, placed, lambda: runs_of(spans, placed))


def runs_of(spans: Tensor, placed: bool) -> list[Run] | None:
    """None for spans that flash attention would take for others. ``placed``: it matters where a query is among keys."""
    runs: list[list[list[int]]] = []
    for span in spans.tolist():
        begin, end, first, last, shift = span
        if begin == end or first == last:
            continue  # zeros
        # Of more queries than keys the first ones would see nothing.
        if placed and (end + shift != last or end - begin > last - first):
            return None
        if runs and runs[-1][-1][1] == begin and runs[-1][-1][3] == first:
            runs[-1].append(span)
        else:
            runs.append([span])
    return [_run(of_run, spans.device) for of_run in runs]


def _run(spans: list[list[int]], device: torch.device) -> Run:
    (begin, _, first, *_), (_, end, _, last, _) = spans[0], spans[-1]
    starts = [
        [span[side] - spans[0][side] for span in spans] + [stop] for side, stop in ((0, end - begin), (2, last - first))
    ]
    longest = [max(b - a for a, b in pairwise(of_side)) for of_side in starts]
    queries, keys = torch.tensor(starts, dtype=torch.int32).to(device)
    return Run(slice(begin, end), slice(first, last), Lengths(queries, keys, *longest))
