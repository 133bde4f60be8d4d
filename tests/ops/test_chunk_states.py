"""The states between chunks that the chunked kernels keep for the backward, as a whole."""

import pytest
import torch
from implementations import implementation
from selective_scan_data import offsets, relative_error

from packc import config

KERNELS = pytest.mark.parametrize("kernels", ["triton", pytest.param("gpu", marks=pytest.mark.gpu)])


def kept(op, lengths, packed):
    torch.manual_seed(0)
    L = sum(lengths)
    q, k, v = torch.randn(1, L, 1, 4), torch.randn(1, L, 1, 4) / 2, torch.randn(1, L, 1, 17)
    g, beta = -torch.rand(1, L, 1), torch.rand(1, L, 1)
    arguments = (q, k, v, g, beta) if op == "gated_delta_rule" else (q, k, v, g)
    return getattr(torch.ops.packc, op)(*arguments, 1.0, offsets(lengths) if packed else None, None, True)[2]


@pytest.fixture
def unwritten_memory_is_nan(monkeypatch):
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *size, **options):
        x = new_empty(self, *size, **options)
        return x.fill_(torch.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@KERNELS
@pytest.mark.parametrize(
    ("lengths", "packed"), [([70], False), ([5, 0, 70, 130, 1, 0], True)], ids=["row", "documents"]
)
@pytest.mark.parametrize("op", ["linear_attention", "gated_delta_rule"])
def test_slots_and_padding_that_nothing_is_kept_in_are_zero(kernels, unwritten_memory_is_nan, op, lengths, packed):
    with implementation(kernels):
        found = kept(op, lengths, packed)
        with config.patch(kernels="reference"):
            wanted = kept(op, lengths, packed)
    assert relative_error(found, wanted) < 2e-6
