"""``packc::pack``, ``unpack``, and what finds places in a pack: schemas, implementations, fakes, autograd.

Opaque, so that Inductor neither re-derives a gather's backward as an atomic scatter nor guesses the token count.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import SymInt, Tensor

from packc.ops import derivatives, dispatch
from packc.ops.definition import define
from packc.ops.untraced import untraced


def _pack(x: Tensor, index: Tensor) -> Tensor:
    kernels = _kernels(x)
    if kernels == "triton":
        from packc.ops.pack import triton_op

        return triton_op.pack(x, index)
    rows = torch.ops.packc_cpu.gather_rows if kernels == "cpu" else _gather_rows
    return rows(x.flatten(0, 1), index).unsqueeze(0)


def _gather_rows(x: Tensor, index: Tensor) -> Tensor:
    return x.index_select(0, index)


def _pack_fake(x: Tensor, index: Tensor) -> Tensor:
    return x.new_empty((1, index.shape[0], *x.shape[2:]))


def _unpack(x: Tensor, index: Tensor, batch: int, length: int) -> Tensor:
    kernels = _kernels(x)
    if kernels == "triton":
        from packc.ops.pack import triton_op

        return triton_op.unpack(x, index, batch, length)
    # torch's own index_copy on the CPU takes a view of every row first.
    rows = torch.ops.packc_cpu.scatter_rows if kernels == "cpu" else _scatter_rows
    return rows(x.squeeze(0), index, batch * length).unflatten(0, (batch, length))


def _scatter_rows(x: Tensor, index: Tensor, rows: int) -> Tensor:
    return x.new_zeros((rows, *x.shape[1:])).index_copy_(0, index, x)


def _kernels(x: Tensor) -> str:
    # Bits are copied, so dtypes do not matter: asked for the plainest one.
    chosen = dispatch.choose("pack", x.new_empty(0, dtype=torch.float32))
    if chosen == "triton":
        from packc.ops.pack import triton_op

        return "triton" if triton_op.supports(x) else "reference"
    return chosen


def _unpack_fake(x: Tensor, index: Tensor, batch: int | SymInt, length: int | SymInt) -> Tensor:
    return x.new_empty((batch, length, *x.shape[2:]))


@untraced
def _packing_index(mask: Tensor) -> tuple[Tensor, Tensor]:
    real = mask != 0
    cu_seqlens = torch.zeros(mask.shape[0] + 1, dtype=torch.int32, device=mask.device)
    torch.cumsum(real.sum(1), 0, dtype=torch.int32, out=cu_seqlens[1:])
    return real.flatten().nonzero().flatten(), cu_seqlens


def _packing_index_fake(mask: Tensor) -> tuple[Tensor, Tensor]:
    tokens = torch.library.get_ctx().new_dynamic_size()
    return mask.new_empty((tokens,), dtype=torch.int64), mask.new_empty((mask.shape[0] + 1,), dtype=torch.int32)


@untraced
def _counted_anew(index: Tensor, cu_seqlens: Tensor, length: int) -> Tensor:
    """The index (T,) with each document that is not its row's first moved to where its row begins."""
    starts = cu_seqlens[:-1].long()
    last = index.shape[0] - 1
    first, before = index[starts.clamp(max=last)], index[(starts - 1).clamp(0, last)]
    later = (starts > 0) & (before // length == first // length)
    moved = torch.where(later, first % length, 0)
    return index - moved.repeat_interleave(cu_seqlens.long().diff(), output_size=index.shape[0])


def _counted_anew_fake(index: Tensor, cu_seqlens: Tensor, length: int | SymInt) -> Tensor:
    return torch.empty_like(index)


@untraced
def _positions(index: Tensor, length: int) -> Tensor:
    """Of every place in an index (T,), the position in its row."""
    return index % length


def _positions_fake(index: Tensor, length: int | SymInt) -> Tensor:
    return torch.empty_like(index)


@untraced
def _row_ends(index: Tensor, batch: int, length: int, size: int) -> tuple[Tensor, Tensor]:
    """Of the last ``size`` positions of every row, row by row: where they are in the index (T,), and which are not."""
    ends = torch.arange(1, batch + 1, device=index.device) * length
    places = (ends[:, None] + torch.arange(-size, 0, device=index.device)).flatten()
    at = torch.searchsorted(index, places).clamp_(max=index.shape[0] - 1)
    return at, index[at] != places


def _row_ends_fake(
    index: Tensor, batch: int | SymInt, length: int | SymInt, size: int | SymInt
) -> tuple[Tensor, Tensor]:
    return index.new_empty((batch * size,)), index.new_empty((batch * size,), dtype=torch.bool)


@untraced
def _in_chunks(cu_seqlens: Tensor, tokens: int, size: int) -> Tensor:
    """``cu_seqlens`` (N + 1,) of documents' chunks of ``size`` tokens, the last of each shorter; empty ones follow, so
    that there are ``N + tokens // size``, whatever the documents."""
    starts = cu_seqlens.long()
    until = torch.cumsum((starts.diff() + size - 1) // size, 0)
    chunk = torch.arange(cu_seqlens.shape[0] + tokens // size, device=cu_seqlens.device)
    document = torch.searchsorted(until, chunk, right=True)
    before = torch.cat([until.new_zeros(1), until])[document]
    return torch.clamp(starts[document] + (chunk - before) * size, max=tokens).int()


def _in_chunks_fake(cu_seqlens: Tensor, tokens: int | SymInt, size: int | SymInt) -> Tensor:
    return cu_seqlens.new_empty((cu_seqlens.shape[0] + tokens // size,))


define("pack(Tensor x, Tensor index) -> Tensor", _pack, _pack_fake)
define("unpack(Tensor x, Tensor index, SymInt batch, SymInt length) -> Tensor", _unpack, _unpack_fake)
define("counted_anew(Tensor index, Tensor cu_seqlens, SymInt length) -> Tensor", _counted_anew, _counted_anew_fake)
define("positions(Tensor index, SymInt length) -> Tensor", _positions, _positions_fake)
define(
    "row_ends(Tensor index, SymInt batch, SymInt length, SymInt size) -> (Tensor at, Tensor absent)",
    _row_ends,
    _row_ends_fake,
)
define("in_chunks(Tensor cu_seqlens, SymInt tokens, SymInt size) -> Tensor", _in_chunks, _in_chunks_fake)
define("packing_index(Tensor mask) -> (Tensor index, Tensor cu_seqlens)", _packing_index, _packing_index_fake)


def _pack_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, index = inputs
    ctx.save_for_backward(index)
    ctx.batch, ctx.length = x.shape[0], x.shape[1]


def _pack_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (index,) = ctx.saved_tensors
    return torch.ops.packc.unpack.default(grad, index, ctx.batch, ctx.length), None


def _unpack_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _unpack_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    (index,) = ctx.saved_tensors
    return torch.ops.packc.pack.default(grad, index), None, None, None


derivatives.register("pack", _pack, _pack_setup, _pack_backward)
derivatives.register("unpack", _unpack, _unpack_setup, _unpack_backward)
