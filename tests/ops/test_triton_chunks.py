"""The chunks of documents as a kernel lists them."""

import pytest
import torch
from implementations import implementation
from selective_scan_data import offsets

from packc.ops.common.triton_chunks import chunks_of

KERNELS = pytest.mark.parametrize("kernels", ["triton", pytest.param("gpu", marks=pytest.mark.gpu)])


def listed(starts, sizes):
    """Document, first token, tokens, and 1 for the document's first, 2 for its last chunk."""
    return [
        [n, start + begin, min(size - begin, 64), (begin == 0) + 2 * (size - begin <= 64)]
        for n, (start, size) in enumerate(zip(starts, sizes, strict=True))
        for begin in range(0, size, 64)
    ]


@KERNELS
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    "lengths", [[0], [1], [64], [5, 0, 64, 65, 0], [1] * 300 + [130, 0], [20_000, 3]], ids=lambda lengths: len(lengths)
)
def test_every_chunk_of_every_document_is_listed_once_and_the_rest_is_empty(kernels, dtype, lengths):
    with implementation(kernels):
        cu_seqlens = offsets(lengths).to(dtype)
        chunks = chunks_of(cu_seqlens, torch.empty(1, sum(lengths), 1))
    starts = cu_seqlens[:-1].tolist()
    wanted = listed(starts, lengths)
    assert chunks.table.tolist() == wanted + [[0, 0, 0, 0]] * (chunks.bound - len(wanted))
    assert chunks.starts.tolist() == cu_seqlens.tolist()
    assert chunks.first.tolist() == [sum(-(-size // 64) for size in lengths[:n]) for n in range(len(lengths) + 1)]


@KERNELS
@pytest.mark.parametrize(("rows", "length"), [(3, 130), (2, 64), (0, 5), (2, 0)])
def test_rows_are_documents(kernels, rows, length):
    with implementation(kernels):
        chunks = chunks_of(None, torch.empty(rows, length, 1))
    assert chunks.table.tolist() == listed([0] * rows, [length] * rows)
    assert chunks.starts.tolist() == [n * length for n in range(rows + 1)]
    assert chunks.first.tolist() == [n * -(-length // 64) for n in range(rows + 1)]
