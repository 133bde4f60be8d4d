"""Documents: which cu_seqlens are accepted, and which token belongs to which document."""

import pytest
import torch

from packc.ops import documents


@pytest.mark.parametrize(
    ("cu_seqlens", "shape", "error", "message"),
    [
        (torch.tensor([0.0, 4.0]), (1, 4, 2), TypeError, "int32 or int64, not torch.float32"),
        (torch.tensor([[0, 4]]), (1, 4, 2), ValueError, r"\(N \+ 1,\), not \(1, 2\)"),
        (torch.tensor([], dtype=torch.int32), (1, 4, 2), ValueError, r"not \(0,\)"),
        (torch.tensor([0, 4]), (2, 4, 2), ValueError, r"one packed row \(1, L, ...\), not \(2, 4, 2\)"),
    ],
)
def test_what_cannot_divide_a_row_is_refused(cu_seqlens, shape, error, message):
    with pytest.raises(error, match=message):
        documents.check_cu_seqlens(cu_seqlens, torch.empty(shape))


@pytest.mark.parametrize("starts", [[1, 5], [0, 4], [0, 3, 2, 5], [0, 6]])
def test_documents_must_cover_the_tokens_in_order(starts):
    with pytest.raises(ValueError, match="rise from 0 to L = 5"):
        documents.offsets(torch.tensor(starts), torch.empty(1, 5, 1))


def test_without_cu_seqlens_rows_are_documents():
    x = torch.empty(3, 4, 1)
    assert documents.offsets(None, x).tolist() == [0, 4, 8, 12]
    assert documents.count(None, x) == 3


def test_empty_documents_own_no_token():
    cu_seqlens = torch.tensor([0, 0, 2, 2, 2, 3, 3], dtype=torch.int32)
    starts = documents.offsets(cu_seqlens, torch.empty(1, 3, 1))
    assert documents.of_token(starts, 3).tolist() == [1, 1, 4]
    assert documents.count(cu_seqlens, torch.empty(1, 3, 1)) == 6


def test_sizes_that_only_a_run_can_tell_are_not_compared():
    @torch.compile(backend="aot_eager", fullgraph=True)
    def f(x, cu_seqlens):
        documents.check_cu_seqlens(cu_seqlens, x)
        return x + documents.differ(x.shape[1], 5)

    x, cu_seqlens = torch.zeros(1, 7, 1), torch.tensor([0, 7])
    torch._dynamo.decorators.mark_unbacked(x, 1)
    torch._dynamo.decorators.mark_unbacked(cu_seqlens, 0)
    assert not f(x, cu_seqlens).any()
