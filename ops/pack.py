"""pack and unpack: padded ``(B, L, ...)`` <-> packed ``(1, T, ...)``, each the other's backward.

Opaque, so that Inductor neither re-derives a gather's backward as an atomic scatter nor guesses the token count.
"""

from __future__ import annotations

import torch
from torch import SymInt, Tensor

from packc import config
from packc.ops import cpu_library

_lib = torch.library.Library("packc", "FRAGMENT")
_lib.define("pack(Tensor x, Tensor index) -> Tensor")
_lib.define("unpack(Tensor x, Tensor index, SymInt batch, SymInt length) -> Tensor")


def _pack(x: Tensor, index: Tensor) -> Tensor:
    tokens = x.flatten(0, 1)
    rows = torch.ops.packc_cpu.gather_rows if _has_kernel(x) else _gather_rows
    return rows(tokens, index).unsqueeze(0)


def _gather_rows(x: Tensor, index: Tensor) -> Tensor:
    return x.index_select(0, index)


def _pack_fake(x: Tensor, index: Tensor) -> Tensor:
    return x.new_empty((1, index.shape[0], *x.shape[2:]))


def _unpack(x: Tensor, index: Tensor, batch: int, length: int) -> Tensor:
    rows = torch.ops.packc_cpu.scatter_rows if _has_kernel(x) else _scatter_rows
    return rows(x.squeeze(0), index, batch * length).unflatten(0, (batch, length))


def _scatter_rows(x: Tensor, index: Tensor, rows: int) -> Tensor:
    return x.new_zeros((rows, *x.shape[1:])).index_copy_(0, index, x)


def _has_kernel(x: Tensor) -> bool:
    # torch's own index_copy on the CPU takes a view of every row first.
    return x.device.type == "cpu" and config.kernels in ("auto", "cpu") and cpu_library.load("pack")


def _unpack_fake(x: Tensor, index: Tensor, batch: int | SymInt, length: int | SymInt) -> Tensor:
    return x.new_empty((batch, length, *x.shape[2:]))


for _key in ("CPU", "CUDA"):
    _lib.impl("pack", _pack, _key)
    _lib.impl("unpack", _unpack, _key)
torch.library.register_fake("packc::pack", _pack_fake, lib=_lib)
torch.library.register_fake("packc::unpack", _unpack_fake, lib=_lib)


def _pack_setup(ctx, inputs, output) -> None:
    x, index = inputs
    ctx.save_for_backward(index)
    ctx.batch, ctx.length = x.shape[0], x.shape[1]


def _pack_backward(ctx, grad: Tensor):
    (index,) = ctx.saved_tensors
    return torch.ops.packc.unpack.default(grad, index, ctx.batch, ctx.length), None


def _unpack_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1])


def _unpack_backward(ctx, grad: Tensor):
    (index,) = ctx.saved_tensors
    return torch.ops.packc.pack.default(grad, index), None, None, None


torch.library.register_autograd("packc::pack", _pack_backward, setup_context=_pack_setup, lib=_lib)
torch.library.register_autograd("packc::unpack", _unpack_backward, setup_context=_unpack_setup, lib=_lib)


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


def _check_index(op: str, index: Tensor) -> None:
    if index.ndim != 1 or index.dtype != torch.int64:
        raise ValueError(f"{op}: index must be int64 of shape (T,), got {index.dtype} of shape {tuple(index.shape)}")
