"""pack and unpack: padded ``(B, L, ...)`` <-> packed ``(1, T, ...)``, each the other's backward."""

import torch
from torch import Tensor

from packc.ops.pack import op as op


def pack(x: Tensor, index: Tensor) -> Tensor:
    """Gather tokens: ``(B, L, ...)`` -> ``(1, T, ...)``.

    Args:
        x: padded values ``(B, L, ...)``, any dtype and strides.
        index: int64 ``(T,)``: for each packed token ``b * L + l``, its place in the padded batch. No index twice: the
            backward copies, it does not accumulate.

    Raises:
        ValueError: ``x`` has fewer than two axes, or ``index`` is not one-dimensional int64.
    """
    if x.ndim < 2:
        raise ValueError(f"pack: x must be (B, L, ...), got shape {tuple(x.shape)}")
    _check_index("pack", index)
    return torch.ops.packc.pack.default(x, index)


def unpack(x: Tensor, index: Tensor, batch: int, length: int) -> Tensor:
    """Scatter tokens back: ``(1, T, ...)`` -> contiguous ``(batch, length, ...)``, zero where no token goes.

    Args:
        x: packed values ``(1, T, ...)``.
        index: as for :func:`pack`.
        batch: rows B of the padded batch.
        length: columns L of the padded batch.

    Raises:
        ValueError: ``x`` is not ``(1, T, ...)`` with T the length of ``index``.
    """
    _check_index("unpack", index)
    if x.ndim < 2 or x.shape[0] != 1 or x.shape[1] != index.shape[0]:
        raise ValueError(
            f"unpack: x must be (1, T, ...) with T = {index.shape[0]} as in index, got shape {tuple(x.shape)}"
        )
    return torch.ops.packc.unpack.default(x, index, batch, length)


def packing_index(mask: Tensor) -> tuple[Tensor, Tensor]:
    """What :func:`pack` and the mixers need, from a mask: for packing by hand, inside compiled code too.

    There, T is a size that only a run can tell; Dynamo traces it under
    ``torch._dynamo.config.capture_dynamic_output_shape_ops``.

    Args:
        mask: ``(B, L)``, bool or integer, nonzero at tokens: padded on either side, or with holes.

    Returns:
        ``index``: int64 ``(T,)``, the places ``b * L + l`` of all tokens, row by row. ``cu_seqlens``: int32
        ``(B + 1,)``, where each row's tokens begin among them, and T.

    Raises:
        ValueError: ``mask`` is not two-dimensional, or floating.
    """
    if mask.ndim != 2 or mask.is_floating_point() or mask.is_complex():
        raise ValueError(f"packing_index: mask must be (B, L), bool or int, got {mask.dtype} of {tuple(mask.shape)}")
    return torch.ops.packc.packing_index.default(mask)


def _check_index(op: str, index: Tensor) -> None:
    if index.ndim != 1 or index.dtype != torch.int64:
        raise ValueError(f"{op}: index must be int64 of shape (T,), got {index.dtype} of shape {tuple(index.shape)}")
