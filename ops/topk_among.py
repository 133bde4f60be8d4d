"""``packc::topk_among``: the largest entries in some of the columns alone, whose number the data knows."""

from __future__ import annotations

import torch
from torch import SymInt, Tensor
from torch.nn import functional as F

from packc.ops.definition import define


def topk_among(x: Tensor, among: Tensor, k: int) -> Tensor:
    """``x[..., among].topk(k).indices``, counted among all columns, ``(..., k)``; -1 behind as many as there are."""
    return torch.ops.packc.topk_among.default(x, among, k)


def _topk_among(x: Tensor, among: Tensor, k: int) -> Tensor:
    columns = among.nonzero()[:, 0]
    found = columns[x[..., columns].topk(min(k, len(columns))).indices]
    return F.pad(found, (0, k - found.shape[-1]), value=-1)


def _fake(x: Tensor, among: Tensor, k: int | SymInt) -> Tensor:
    return x.new_empty((*x.shape[:-1], k), dtype=torch.int64)


define("topk_among(Tensor x, Tensor among, SymInt k) -> Tensor", _topk_among, _fake)
