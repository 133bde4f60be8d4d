"""Documents of a packed row do not attend to each other."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from varlen_attention_data import inputs, offsets, run, with_grads

from packc import config
from packc.ops import varlen_attention

LENGTHS = st.lists(st.integers(0, 5) | st.sampled_from([31, 32, 33, 64, 130, 257]), min_size=1, max_size=6)
WINDOWS = st.sampled_from([None, 1, 5, 64])


@pytest.fixture(params=["reference", "cpu"])
def kernels(request):
    with config.patch(kernels=request.param):
        yield request.param


def same(kernels, a, b):
    """The kernels give a document the same bits wherever it lies; torch's matrix products do not."""
    return torch.equal(a, b) if kernels == "cpu" else torch.allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
@settings(max_examples=10, deadline=None, derandomize=True)
@given(lengths=LENGTHS, window=WINDOWS)
def test_packed_documents_are_each_document_alone(kernels, lengths, window):
    with config.patch(kernels=kernels):
        leaves, cu_seqlens = inputs(lengths)
        packed = run(leaves, cu_seqlens, window=window)
        torch.manual_seed(1)
        dout = torch.randn(packed[0].shape, dtype=torch.float64).float()
        for begin, end in pairwise(cu_seqlens.tolist()):
            alone = [leaf.detach()[:, begin:end].requires_grad_() for leaf in leaves]
            out = varlen_attention(*alone, cu_seqlens=offsets([end - begin]), window=window)
            grads = torch.autograd.grad(out, alone, dout[:, begin:end])
            for whole, part in zip(packed, (out, *grads), strict=True):
                assert same(kernels, whole[:, begin:end], part)


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 5}, {"window": 5, "causal": False}], ids=str)
def test_permuting_documents_permutes_outputs(kernels, options):
    lengths, order = [3, 40, 0, 1, 130], [4, 2, 0, 3, 1]
    leaves, cu_seqlens = inputs(lengths)
    starts = cu_seqlens.tolist()
    index = torch.cat([torch.arange(starts[n], starts[n + 1]) for n in order])
    moved = [leaf.detach()[:, index].requires_grad_() for leaf in leaves]
    out = varlen_attention(*leaves, cu_seqlens=cu_seqlens, **options)
    dout = torch.randn_like(out)
    results = [out, *torch.autograd.grad(out, leaves, dout)]
    out = varlen_attention(*moved, cu_seqlens=offsets([lengths[n] for n in order]), **options)
    for a, b in zip(results, [out, *torch.autograd.grad(out, moved, dout[:, index])], strict=True):
        assert same(kernels, a[:, index], b)


@pytest.mark.parametrize("bad", [0, 2, 4])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 5}, {"mask_mod": "parity"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_in_one_document_changes_no_bit_of_another(kernels, bad, poison, options, dtype):
    if "mask_mod" in options:
        if kernels == "cpu":
            pytest.skip("the reference serves a mask_mod")
        options = {"mask_mod": lambda b, h, q_idx, kv_idx: (q_idx - kv_idx) % 2 == 0}
    lengths = [3, 1, 30, 30, 130]
    leaves, cu_seqlens = inputs(lengths, dtype=dtype)
    begin, end = cu_seqlens[bad : bad + 2].tolist()
    clean = run(leaves, cu_seqlens, **options)
    with torch.no_grad():
        for leaf in leaves:
            leaf[:, begin:end] = poison
    dirty = run(leaves, cu_seqlens, **options)
    others = [t for t in range(sum(lengths)) if not begin <= t < end]
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a[:, others], b[:, others])
    assert not dirty[0][:, begin:end].isfinite().any()


def test_a_nan_gradient_of_one_document_reaches_no_other(kernels):
    leaves, cu_seqlens = inputs([20, 30])
    out = varlen_attention(*leaves, cu_seqlens=cu_seqlens)
    _, *clean = with_grads(out, leaves)
    out = varlen_attention(*leaves, cu_seqlens=cu_seqlens)
    torch.manual_seed(1)
    dout = torch.randn(out.shape, dtype=torch.float64).float()
    dout[:, :20] = float("nan")
    for a, b in zip(clean, torch.autograd.grad(out, leaves, dout), strict=True):
        assert torch.equal(a[:, 20:], b[:, 20:])


@pytest.mark.parametrize("options", [{}, {"window": 5}], ids=str)
def test_a_token_sees_no_later_one(kernels, options):
    leaves, cu_seqlens = inputs([40, 30])
    clean = varlen_attention(*leaves, cu_seqlens=cu_seqlens, **options)
    with torch.no_grad():
        for leaf in leaves:
            leaf[:, 20:40] += 1
    assert torch.equal(clean[:, :20], varlen_attention(*leaves, cu_seqlens=cu_seqlens, **options)[:, :20])
    with torch.no_grad():
        leaves[2][:, 50] += 1
    changed = varlen_attention(*leaves, cu_seqlens=cu_seqlens, **options) != clean
    assert changed[0, 40:].any(-1).any(-1).nonzero().flatten().tolist() == list(range(10, 15 if options else 30))
