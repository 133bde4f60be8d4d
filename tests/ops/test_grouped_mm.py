"""Rows sorted by group, times their group's matrix: values and gradients are those of one product a group."""

import pytest
import torch

import packc
from packc.ops.grouped_mm import grouped_mm

K, N = 5, 3
SIZES = {"several": [4, 1, 2], "empty ones": [0, 3, 0, 2, 0], "none": [0, 0], "rows of none": [2, 3]}
S = 9


def operands(sizes, *, transposed=False, dtype=torch.float32):
    x = torch.randn(S, K, dtype=dtype)
    weight = torch.randn(len(sizes), N, K, dtype=dtype).mT if transposed else torch.randn(len(sizes), K, N, dtype=dtype)
    return x.requires_grad_(), weight.requires_grad_(), torch.tensor(sizes).cumsum(0).int()


def one_by_one(x, weight, ends):
    group = torch.searchsorted(ends, torch.arange(x.shape[0]), right=True)
    chosen = torch.nn.functional.pad(weight, (0, 0, 0, 0, 0, 1))[group]
    return (x[:, None] @ chosen).squeeze(1)


def results(function, x, weight, ends):
    out = function(x, weight, ends)
    wanted = torch.randn(S, N, generator=torch.Generator().manual_seed(1))
    return out, *torch.autograd.grad((out * wanted.to(x.dtype)).sum(), (x, weight))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("name", SIZES)
def test_each_row_is_multiplied_by_its_groups_matrix(name, kernels, transposed):
    given = operands(SIZES[name], transposed=transposed)
    expected = results(one_by_one, *(each.detach().double().requires_grad_() for each in given[:2]), given[2])
    with packc.config.patch(kernels=kernels):
        found = results(grouped_mm, *given)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    assert found[2].stride() == given[1].stride()


def test_what_is_not_written_is_zero(monkeypatch):
    """Memory that is not filled holds what was there before."""

    def dirty(*size, **options):
        return torch.full(*size, torch.nan, **options)

    x, weight, ends = (each.detach() for each in operands(SIZES["empty ones"]))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *size: dirty(size[0] if len(size) == 1 else size))
    monkeypatch.setattr(torch, "empty_like", lambda like: dirty(like.shape))
    out = torch.ops.packc.grouped_mm(x, weight, ends)
    grad_x, grad_weight = torch.ops.packc.grouped_mm_bwd(torch.ones(S, N), x, weight, ends)
    for each, of_none in ((out, slice(5, None)), (grad_x, slice(5, None)), (grad_weight, [0, 2, 4])):
        assert each.isfinite().all()
        assert each[of_none].eq(0).all()


def test_derivatives_of_any_order():
    given = operands([2, 0, 3], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: grouped_mm(x, w, given[2]), given[:2], check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x, w: grouped_mm(x, w, given[2]), given[:2])


def test_opcheck():
    x, weight, ends = operands([2, 0, 3])
    torch.library.opcheck(torch.ops.packc.grouped_mm.default, (x, weight, ends))
    torch.library.opcheck(torch.ops.packc.grouped_mm_bwd.default, (torch.randn(S, N), x, weight, ends))


def test_what_does_not_fit_is_named():
    x, weight, ends = operands([2, 3])
    for given in (
        (x[:, 1:], weight, ends),
        (x, weight.double(), ends),
        (x, weight, ends[1:]),
        (x, weight, ends.float()),
    ):
        with pytest.raises(ValueError, match=r"grouped_mm: x \(S, K\), weight \(G, K, N\) and ends \(G,\), integers"):
            grouped_mm(*given)
