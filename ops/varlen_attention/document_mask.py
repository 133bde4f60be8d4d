"""What each token of a packed row sees, as FlexAttention wants it; made once for a batch, not once for a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from packc.ops import documents

if TYPE_CHECKING:  # it imports Dynamo, which takes as long as the rest of packc
    from torch.nn.attention.flex_attention import BlockMask

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""``mask_mod(b, h, q_idx, kv_idx) -> bool``, of scalars: whether a token sees another."""

BLOCK = 128  # tokens of a tile, FlexAttention's default

_T = TypeVar("_T")
_batches: WeakIdKeyDictionary = WeakIdKeyDictionary()


def once_per_batch(cu_seqlens: Tensor, key: Any, build: Callable[[], _T]) -> _T:
    """``build()``, or what it gave before for this tensor and ``key``, unless the tensor was written to meanwhile.

    It is forgotten together with the tensor, so what ``build`` returns must not hold on to it.
    """
    if cu_seqlens.is_inference():  # nobody counts the writes to it
        return build()
    version, built = _batches.get(cu_seqlens, (None, {}))
    if version != cu_seqlens._version:
        built = {}
        _batches[cu_seqlens] = (cu_seqlens._version, built)
    if key not in built:
        built[key] = build()
    return built[key]


def longest(cu_seqlens: Tensor, T: int) -> int:
    """Tokens of the longest document; on CUDA one wait for the device in a batch."""
    if cu_seqlens.shape[0] < 3:
        return T
    return once_per_batch(cu_seqlens, "longest", lambda: int(cu_seqlens.diff().max()))


def block_mask(cu_seqlens: Tensor, T: int, causal: bool, window: int | None, every_tile: bool = False) -> BlockMask:
    """That of the documents. ``every_tile``: with ``mask_mod`` asked in every tile, for one that will be narrowed."""
    return once_per_batch(
        cu_seqlens,
        (T, causal, window, every_tile),
        lambda: build(*key_range(cu_seqlens, T, causal, window), every_tile),
    )


def key_range(cu_seqlens: Tensor, T: int, causal: bool, window: int | None) -> tuple[Tensor, Tensor]:
    """The first and the last key that each token sees: int64 ``(T,)``, both never falling."""
    starts = cu_seqlens.long()
    document, token = documents.of_token(starts, T), torch.arange(T, device=starts.device)
    first, last = starts[document], token if causal else starts[document + 1] - 1
    if window is None:
        return first, last
    return torch.maximum(first, token - window + 1), torch.minimum(last, token + window - 1)


def build(first: Tensor, last: Tensor, every_tile: bool) -> BlockMask:
    """The mask of ``key_range``, from the corners of tiles: T / 128 squared comparisons, where T squared would do.

    As both ends never fall, and the ranges of neighbours in a tile touch, a tile's tokens together see all from the
    first one's first key to the last one's last key, and each of them all from the last one's first to the first one's
    last.
    """
    from torch.nn.attention.flex_attention import BlockMask

    T = first.shape[0]
    begin = torch.arange(0, T, BLOCK, device=first.device)
    end = torch.clamp(begin + BLOCK, max=T) - 1
    some = (first[begin, None] <= end) & (begin <= last[end, None])
    every = (first[end, None] <= begin) & (end <= last[begin, None])
    complete = begin + BLOCK <= T
    every &= complete & complete[:, None] & (not every_tile)
    return BlockMask.from_kv_blocks(
        *_listed(some & ~every),
        *_listed(every),
        BLOCK_SIZE=BLOCK,
        mask_mod=lambda b, h, q_idx, kv_idx: (first[q_idx] <= kv_idx) & (kv_idx <= last[q_idx]),
        seq_lengths=(T, T),
    )


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """How many tiles each row has, int32 ``(1, 1, rows)``, and which, int32 ``(1, 1, rows, columns)``, those first."""
    which = tiles.int().argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32)[None, None], which.int()[None, None]
