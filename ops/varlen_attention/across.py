"""Attention of the documents of one row to those of another: document n to document n, of whatever length.

``packc::document_spans`` says which keys that are; ``packc::cross_attention`` is what padded graphs are rewritten to:
``packc::attention_spans`` of rows, or of documents, to documents.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from packc.ops import documents
from packc.ops.definition import LIBRARY, define
from packc.ops.varlen_attention import spans as spans

LIBRARY.define(
    "cross_attention(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, Tensor cu_seqlens_k, float? scale, "
    "float dropout_p, Tensor? seed) -> Tensor"
)
_packc = torch.ops.packc


def _document_spans(cu_seqlens: Tensor, cu_seqlens_k: Tensor, T: int, T_k: int) -> Tensor:
    """int64 ``(N, 5)``, as ``packc::attention_spans`` wants them: the last query of a document is at its last key."""
    if cu_seqlens.shape != cu_seqlens_k.shape:
        counts = cu_seqlens.shape[0] - 1, cu_seqlens_k.shape[0] - 1
        raise ValueError("cu_seqlens_k must have the {} documents of cu_seqlens, not {}".format(*counts))
    of_queries, of_keys = cu_seqlens.long(), cu_seqlens_k.long()
    if of_queries.device.type == "cpu":
        documents.check_offsets(of_queries, T)
        documents.check_offsets(of_keys, T_k, "cu_seqlens_k")
    begin, end, first, last = of_queries[:-1], of_queries[1:], of_keys[:-1], of_keys[1:]
    return torch.stack([begin, end, first, last, last - end], 1)


def _document_spans_fake(cu_seqlens: Tensor, *_: Any) -> Tensor:
    return cu_seqlens.new_empty((cu_seqlens.shape[0] - 1, 5), dtype=torch.int64)


def _cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor,
    scale: float | None,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """``q (B, L, H, K)`` without ``cu_seqlens``: a row is a document."""
    B, L, H, K = q.shape
    if cu_seqlens is None:
        cu_seqlens = torch.arange(B + 1, device=q.device) * L
    q = q.reshape(1, B * L, H, K)
    which = _packc.document_spans.default(cu_seqlens, cu_seqlens_k, B * L, k.shape[1])
    scale = K**-0.5 if scale is None else scale
    out = _packc.attention_spans.default(q, k, v, None, None, which, False, scale, None, dropout_p, seed, None)[0]
    return out.reshape(B, L, H, v.shape[3])


define(
    "document_spans(Tensor cu_seqlens, Tensor cu_seqlens_k, SymInt T, SymInt T_k) -> Tensor",
    _document_spans,
    _document_spans_fake,
    (torch.Tag.pt2_compliant_tag,),
)
LIBRARY.impl("cross_attention", _cross_attention, "CompositeImplicitAutograd")
