"""pack and unpack: each other's inverse on tokens, each other's backward, on every kernel."""

import pytest
import torch
from harness import masks
from hypothesis import given, settings
from hypothesis import strategies as st

import packc
from packc.ops import pack, unpack

KERNELS = pytest.mark.parametrize("kernels", ["cpu", "reference"])
INDEX = masks(["0110", "1111", "0000"]).flatten().nonzero().flatten()


@KERNELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float64])
@pytest.mark.parametrize("trailing", [(), (5,), (2, 3)])
def test_tokens_survive_the_way_there_and_back(kernels, dtype, trailing):
    x = torch.randint(0, 2, (3, 4, *trailing)).to(dtype)
    with packc.config.patch(kernels=kernels):
        packed = pack(x, INDEX)
        back = unpack(packed, INDEX, 3, 4)
    assert packed.shape == (1, len(INDEX), *trailing)
    assert packed.equal(x.flatten(0, 1)[INDEX][None])
    assert back.flatten(0, 1)[INDEX].equal(packed[0])
    assert back.sum() == packed.sum()  # nothing anywhere else
    assert (back.dtype, back.shape, back.is_contiguous()) == (x.dtype, x.shape, True)


@KERNELS
def test_strided_inputs(kernels):
    x = torch.randn(4, 3, 6).transpose(0, 1)[..., ::2]
    with packc.config.patch(kernels=kernels):
        assert pack(x, INDEX).equal(pack(x.contiguous(), INDEX))
        packed = pack(x, INDEX).transpose(1, 2).contiguous().transpose(1, 2)
        assert unpack(packed, INDEX, 3, 4).equal(unpack(packed.contiguous(), INDEX, 3, 4))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_kernels_agree_for_any_tokens(data):
    batch, length, width = (data.draw(st.integers(1, 6)) for _ in range(3))
    index = torch.tensor(data.draw(st.lists(st.integers(0, batch * length - 1), unique=True)), dtype=torch.int64)
    x = torch.randn(batch, length, width)
    results = []
    for kernels in ("cpu", "reference"):
        with packc.config.patch(kernels=kernels):
            packed = pack(x, index)
            results.append((packed, unpack(packed, index, batch, length)))
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


@KERNELS
def test_gradients(kernels):
    with packc.config.patch(kernels=kernels):
        x = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: pack(x, INDEX), x)
        y = torch.randn(1, len(INDEX), 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda y: unpack(y, INDEX, 3, 4), y)


def test_opcheck():
    x = torch.randn(3, 4, 2, requires_grad=True)
    torch.library.opcheck(torch.ops.packc.pack.default, (x, INDEX))
    torch.library.opcheck(torch.ops.packc.unpack.default, (pack(x, INDEX).detach().requires_grad_(), INDEX, 3, 4))


def test_errors_name_the_argument_and_the_shapes():
    with pytest.raises(ValueError, match=r"x must be \(B, L, ...\), got shape \(3,\)"):
        pack(torch.ones(3), INDEX)
    with pytest.raises(ValueError, match=r"index must be int64 of shape \(T,\), got torch.float32 of shape \(2, 2\)"):
        pack(torch.ones(3, 4), torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"x must be \(1, T, ...\) with T = 6 as in index, got shape \(1, 5\)"):
        unpack(torch.ones(1, 5), INDEX, 3, 4)
    with packc.config.patch(kernels="cpu"), pytest.raises(IndexError, match="is not a place in 8 tokens"):
        pack(torch.ones(2, 4), torch.tensor([8]))
