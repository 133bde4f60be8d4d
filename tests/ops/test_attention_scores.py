"""Attention with capped scores, biases by distance and sinks: against every pair written out, alone and all at once."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from varlen_attention_data import error, inputs, offsets, with_grads

from packc import config
from packc.ops import varlen_attention
from packc.ops.varlen_attention import cuda, reference

LENGTHS = [0, 1, 2, 40, 1, 140, 0]
FORMS = {
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": "H"},
    "sinks of each token": {"sinks": "T H"},
    "biases of a window": {"relative_bias": 7, "window": 7},
    "biases of far keys": {"relative_bias": 150},
    "biases of the past": {"relative_bias": 70, "causal": False},
    "all": {"softcap": 2.0, "sinks": "T H", "relative_bias": 70, "scale": 0.4},
}


@pytest.fixture(params=["reference", "cpu"])
def kernels(request):
    with config.patch(kernels=request.param):
        yield request.param


def made(form, lengths, dtype=torch.float32):
    """Leaves q, k, v and what the form has of ``sinks`` and ``relative_bias``, by name; offsets; and options."""
    leaves, cu_seqlens = inputs(lengths, dtype=dtype)
    options = dict(form)
    tensors = dict(zip("qkv", leaves, strict=True))
    if form := options.pop("sinks", None):
        shape = (4,) if form == "H" else (1, sum(lengths), 4)
        tensors["sinks"] = torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()
    if R := options.pop("relative_bias", None):
        tensors["relative_bias"] = torch.randn(1, sum(lengths), 4, R, dtype=torch.float64).to(dtype).requires_grad_()
    return tensors, cu_seqlens, options


def run(tensors, cu_seqlens, **options):
    return with_grads(varlen_attention(**tensors, cu_seqlens=cu_seqlens, **options), list(tensors.values()))


def written_out(
    q, k, v, sinks=None, relative_bias=None, *, cu_seqlens, causal=True, scale=None, window=None, softcap=None
):
    """As models do, every pair of a document, in the arguments' dtype but for the softmax."""
    outs = []
    for begin, end in pairwise(cu_seqlens.tolist()):
        wide_k, wide_v = (x[0, begin:end].repeat_interleave(q.shape[2] // x.shape[2], 1) for x in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q[0, begin:end], wide_k) * (
            q.shape[3] ** -0.5 if scale is None else scale
        )
        if softcap is not None:
            scores = (scores / softcap).tanh() * softcap
        place = torch.arange(end - begin)
        back = place[:, None] - place
        if relative_bias is not None:
            R = relative_bias.shape[3]
            of_pairs = torch.zeros_like(scores)
            for d in range(min(R, end - begin)):
                diagonal = relative_bias[0, begin + d : end, :, d].mT  # of the queries that have a key so far back
                of_pairs = of_pairs + torch.diag_embed(diagonal, -d)
            scores = scores + of_pairs
        hidden = (back.abs() >= (window or end)) | (back < 0 if causal else torch.zeros_like(back, dtype=torch.bool))
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            of_queries = sinks[0, begin:end].mT if sinks.ndim == 3 else sinks[:, None].expand(-1, end - begin)
            scores = torch.cat([scores, of_queries[..., None]], -1)
        exact = torch.float64 if q.dtype == torch.float64 else torch.float32
        p = scores.softmax(-1, dtype=exact).to(q.dtype)
        outs.append(torch.einsum("hij,jhd->ihd", p[..., : end - begin], wide_v))
    return torch.cat(outs)[None]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_as_exact_as_those_written_out(kernels, form, dtype):
    tensors, cu_seqlens, options = made(form, LENGTHS, dtype)
    wide = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    leaves = list(tensors.values())
    exact = with_grads(written_out(**wide, cu_seqlens=cu_seqlens, **options), list(wide.values()))
    plain = with_grads(written_out(**tensors, cu_seqlens=cu_seqlens, **options), leaves)
    for x, mine, theirs, expected in zip(
        [leaves[0], *leaves], run(tensors, cu_seqlens, **options), plain, exact, strict=True
    ):
        assert mine.dtype == x.dtype
        assert mine.is_contiguous()
        assert error(mine, expected) <= 2 * error(theirs, expected) + (1e-6 if dtype == torch.float32 else 2e-6)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_gradients_are_exact(form):
    tensors, cu_seqlens, options = made(form, [0, 1, 2, 4], torch.float64)
    tensors = {name: x[..., :4].detach().requires_grad_() for name, x in tensors.items()}

    def call(*values):
        return varlen_attention(**dict(zip(tensors, values, strict=True)), cu_seqlens=cu_seqlens, **options)

    assert gradcheck(call, list(tensors.values()), fast_mode=True)


def test_small_scores_keep_their_digits_under_a_large_cap():
    """tanh of a small number, as 1 - 2 / (e^2x + 1), would have lost them: with a cap of 1000 three of seven."""
    (q, k, _), cu_seqlens = inputs([70], H=1, H_kv=1)
    v = torch.eye(70)[None, :, None]
    found = [
        varlen_attention(x(q), x(k), x(v), cu_seqlens=cu_seqlens, softcap=1e3)
        for x in (torch.Tensor.float, torch.Tensor.double)
    ]
    assert error(*found) < 3e-7


def test_a_cap_bounds_scores_of_any_size(kernels):
    (q, k, v), cu_seqlens = inputs([70], H=1, H_kv=1)
    tensors = {"q": q.detach().mul(1e18).requires_grad_(), "k": k.detach().mul(1e18).requires_grad_(), "v": v}
    out, *grads = run(tensors, cu_seqlens, softcap=2.0)
    assert all(x.isfinite().all() for x in (out, *grads))
    signs = torch.einsum("ihd,jhd->hij", q[0], k[0]).sign().double() * 2
    p = signs.masked_fill(torch.ones(70, 70).triu(1).bool(), -torch.inf).softmax(-1)
    assert error(out[0, :, 0], p[0] @ v[0, :, 0].double()) < 1e-6


def test_a_sink_of_minus_infinity_is_none_and_a_large_one_takes_all(kernels):
    (q, k, v), cu_seqlens = inputs([3, 70])
    given = {"q": q, "k": k, "v": v}
    plain = varlen_attention(**given, cu_seqlens=cu_seqlens)
    for sink, expected in ((-torch.inf, plain), (200.0, torch.zeros_like(plain))):
        sinks = torch.full((4,), sink).requires_grad_()
        out, *grads = run({**given, "sinks": sinks}, cu_seqlens)
        torch.testing.assert_close(out, expected)
        assert grads[-1].abs().max() < 1e-30


@pytest.mark.parametrize("form", ["sinks", "all"])
def test_no_bit_depends_on_the_number_of_threads(form):
    tensors, cu_seqlens, options = made(FORMS[form], [0, 130, 1])
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 8):
            torch.set_num_threads(number)
            results.append(run(tensors, cu_seqlens, **options))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 5) | st.sampled_from([31, 64, 65, 130]), min_size=1, max_size=5),
    form=st.sampled_from(sorted(FORMS)),
)
def test_a_document_has_the_same_bits_whoever_the_neighbours_are(lengths, form):
    tensors, cu_seqlens, options = made(FORMS[form], lengths)
    out, *grads = run(tensors, cu_seqlens, **options)
    torch.manual_seed(1)
    dout = torch.randn(out.shape, dtype=torch.float64).float()
    of_sinks = torch.zeros(4)
    for begin, end in pairwise(cu_seqlens.tolist()):
        alone = {n: x.detach()[:, begin:end] if x.ndim > 1 else x.detach() for n, x in tensors.items()}
        alone = {name: x.clone().requires_grad_() for name, x in alone.items()}
        one = varlen_attention(**alone, cu_seqlens=offsets([end - begin]), **options)
        assert torch.equal(one, out[:, begin:end])
        of_one = torch.autograd.grad(one, list(alone.values()), dout[:, begin:end])
        for name, whole, part in zip(tensors, grads, of_one, strict=True):
            if part.ndim == 1:
                of_sinks += part
            else:
                assert torch.equal(whole[:, begin:end], part), name
    if form == "sinks":
        torch.testing.assert_close(grads[3], of_sinks)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_nan_in_one_document_changes_no_bit_of_another(kernels, poison):
    tensors, cu_seqlens, options = made(FORMS["all"], [3, 70, 30])
    clean = run(tensors, cu_seqlens, **options)
    with torch.no_grad():
        for name in tensors:
            tensors[name][:, 3:73] = poison
    dirty = run(tensors, cu_seqlens, **options)
    others = [0, 1, 2, *range(73, 103)]
    for name, a, b in zip(["out", *tensors], clean, dirty, strict=True):
        assert torch.equal(a[:, others], b[:, others]), name
    assert not dirty[0][:, 3:73].isfinite().all()


@pytest.mark.parametrize("form", ["softcap", "sinks", "sinks of each token", "biases of a window", "all"])
def test_keys_of_another_row_are_seen_from_the_last_one_back(kernels, form):
    """Documents whose queries are the last of their keys: what the same documents give where all are queries."""
    tensors, cu_seqlens, options = made(FORMS[form], [70, 9, 140])
    last = torch.cat([torch.arange(60, 70), torch.arange(70, 79), torch.arange(150, 219)])
    of_queries = {name for name, x in tensors.items() if name not in "kv" and x.ndim > 1}
    few = {name: x.detach()[:, last] if name in of_queries else x.detach() for name, x in tensors.items()}
    few = {name: x.clone().requires_grad_() for name, x in few.items()}
    out = varlen_attention(**few, cu_seqlens=offsets([10, 9, 69]), cu_seqlens_k=cu_seqlens, **options)
    whole = varlen_attention(**tensors, cu_seqlens=cu_seqlens, **options)[:, last]
    torch.testing.assert_close(out, whole)
    weight = torch.randn_like(out)
    found, expected = (
        torch.autograd.grad(y, list(each.values()), weight) for y, each in ((out, few), (whole, tensors))
    )
    for name, mine, theirs in zip(tensors, found, expected, strict=True):
        theirs = theirs[:, last] if name in of_queries else theirs
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["sinks", "sinks of each token"])
def test_gradients_of_fp32_sinks_are_fp32s_beside_bf16(kernels, form):
    """Not those of a result that was rounded: a thousand times as far off."""
    tensors, cu_seqlens, _ = made(FORMS[form], [3, 140], torch.bfloat16)
    tensors["sinks"] = tensors["sinks"].detach().float().requires_grad_()
    wide = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    outs = [varlen_attention(**each, cu_seqlens=cu_seqlens, window=70) for each in (tensors, wide)]
    dout = torch.randn(outs[0].shape).bfloat16()
    found, expected = (
        torch.autograd.grad(out, each["sinks"], dout.to(out.dtype))[0]
        for out, each in zip(outs, (tensors, wide), strict=True)
    )
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize("form", ["sinks", "sinks of each token"])
def test_sinks_are_read_where_they_lie(kernels, form):
    tensors, cu_seqlens, _ = made(FORMS[form], [3, 70])
    sinks = tensors["sinks"].detach()
    apart = torch.stack([sinks, torch.full_like(sinks, torch.nan)], -1)[..., 0].requires_grad_()
    for a, b in zip(run(tensors, cu_seqlens), run({**tensors, "sinks": apart}, cu_seqlens), strict=True):
        assert torch.equal(a, b)


def test_sinks_in_fp64_beside_fp32_are_computed_in_fp64():
    tensors, cu_seqlens, _ = made(FORMS["sinks"], [5, 9])
    wide = tensors["sinks"].detach().double().requires_grad_()
    out, *grads = run({**tensors, "sinks": wide}, cu_seqlens)
    assert (out.dtype, grads[3].dtype) == (torch.float32, torch.float64)
    assert (
        torch.ops.packc.varlen_attention(*tensors.values(), None, cu_seqlens, True, None, None, 0.0, None, None)[
            1
        ].dtype
        == torch.float32
    )


@pytest.mark.parametrize("form", ["sinks", "sinks of each token"])
def test_flash_attention_of_cuda_leaves_a_sink_its_share(monkeypatch, form):
    """Which knows none: by what it gives without, of the keys alone."""

    def flash(q, k, v, starts, keys, *_, dropout_p, return_debug_mask, scale, is_causal):
        out, logsumexp = reference.varlen_attention(
            q[None], k[None], v[None], None, None, starts, is_causal, scale, None
        )
        return out[0], logsumexp, None, None, None

    def flash_bwd(dout, q, k, v, out, logsumexp, starts, *_, dropout_p, rng_state, unused, scale, is_causal):
        # From what it is given alone, as the kernel: in one document.
        wide_k, wide_v = (x.float().repeat_interleave(2, 1) for x in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q.float(), wide_k) * scale
        p = (scores - logsumexp[..., None]).exp().tril()
        dp = torch.einsum("ihd,jhd->hij", dout.float(), wide_v)
        ds = p * (dp - (dout.float() * out.float()).sum(-1).mT[..., None]) * scale
        dk, dv = torch.einsum("hij,ihd->jhd", ds, q.float()), torch.einsum("hij,ihd->jhd", p, dout.float())
        of_groups = (x.unflatten(1, (2, 2)).sum(2).to(k.dtype) for x in (dk, dv))
        return torch.einsum("hij,jhd->ihd", ds, wide_k).to(q.dtype), *of_groups

    monkeypatch.setattr(cuda, "_flash", flash)
    monkeypatch.setattr(cuda, "_flash_bwd", flash_bwd)
    monkeypatch.setattr(cuda, "takes_flash", lambda q, v: True)
    tensors, cu_seqlens, _ = made(FORMS[form], [40], torch.bfloat16)
    q, k, v, sinks = (x.detach() for x in tensors.values())
    options = cu_seqlens, True, None, None, 0.0, None, None
    found = cuda.varlen_attention(q, k, v, sinks.float(), None, *options)
    exact = reference.varlen_attention(*(x.double() for x in (q, k, v, sinks)), None, *options)
    for mine, expected in zip(found, exact, strict=True):
        assert error(mine, expected) < 6e-3
    dout = torch.randn_like(found[0])
    *grads, none = cuda.varlen_attention_bwd(dout, q, k, v, sinks.float(), None, *found, *options)
    assert none is None
    wide = (x.double() for x in (dout, q, k, v, sinks))
    expected = reference.varlen_attention_bwd(*wide, None, *exact, *options)
    for mine, theirs in zip(grads, expected[:4], strict=True):
        assert error(mine, theirs) < 1e-2
