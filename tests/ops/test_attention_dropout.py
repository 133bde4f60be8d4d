"""Attention with dropout: what is dropped follows from the seed, for kernels and specification alike."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint
from varlen_attention_data import error, exact, inputs, offsets, run, with_grads

from packc import config
from packc.ops import varlen_attention
from packc.ops.varlen_attention import dropout

LENGTHS = [0, 1, 2, 40, 130, 1, 67]
SEEN = [{}, {"causal": False, "scale": 0.7}, {"window": 7}, {"causal": False, "window": 70}]
SEED = torch.tensor(2**61 + 12345)


@pytest.fixture(params=["reference", "cpu"])
def kernels(request):
    with config.patch(kernels=request.param):
        yield request.param


def factors(lengths, H, dropout_p, seed=SEED):
    """Of a batch, (H, T, T): dropout's, and 0 between documents."""
    T, starts = sum(lengths), offsets(lengths).tolist()
    whole = torch.zeros(H, T, T, dtype=torch.float64)
    for n, L in enumerate(lengths):
        span = slice(starts[n], starts[n] + L)
        whole[:, span, span] = dropout.factors(seed, n, H, L, dropout_p, whole)
    return whole


# ---- the generator ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_words_its_authors_publish(counter, key, words):
    assert [word.item() for word in dropout.philox(*(tuple(map(torch.tensor, given)) for given in (counter, key)))] == (
        words
    )


def test_the_share_that_is_kept_is_that_asked_for():
    H, L = 8, 200
    for dropout_p in (0.1, 0.5, 0.9):
        kept = (dropout.factors(SEED, 3, H, L, dropout_p, torch.empty(0)) != 0).double()
        deviations = (kept.mean() - (1 - dropout_p)) / (dropout_p * (1 - dropout_p) / kept.numel()) ** 0.5
        assert abs(deviations) < 4
        # Nor does any head, query or key see more than its share.
        for axes in ((1, 2), (0, 2), (0, 1)):
            share = kept.mean(axes)
            deviations = (share - (1 - dropout_p)) / (dropout_p * (1 - dropout_p) * len(share) / kept.numel()) ** 0.5
            assert deviations.abs().max() < 4.5


def test_seeds_documents_and_heads_drop_independently():
    masks = [
        dropout.factors(torch.tensor(seed), document, 2, 100, 0.5, torch.empty(0))[head] != 0
        for seed, document in ((0, 0), (1, 0), (2**32, 0), (0, 1))
        for head in (0, 1)
    ]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            agree = (a == b).double().mean()
            assert abs(agree - 0.5) < 4 * 0.5 / 100


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", SEEN, ids=str)
def test_what_is_dropped_is_what_the_seed_says(options):
    leaves, cu_seqlens = inputs([0, 3, 20, 7], dtype=torch.float64)
    lengths = [0, 3, 20, 7]
    q, (k, v) = leaves[0], (leaf.repeat_interleave(2, 2) for leaf in leaves[1:])
    token = torch.arange(30)
    distance = token[:, None] - token
    seen = factors(lengths, 4, 0.0) != 0
    if options.get("causal", True):
        seen &= distance >= 0
    seen &= distance.abs() < options.get("window", 30)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * options.get("scale", 16**-0.5)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1) * factors(lengths, 4, 0.3)
    expected = with_grads(torch.einsum("bhts,bshd->bthd", weights, v), leaves)
    torch.testing.assert_close(run(leaves, cu_seqlens, dropout_p=0.3, seed=SEED, **options), expected)


@pytest.mark.parametrize("options", SEEN, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_drop_what_the_specification_drops(options, dtype):
    leaves, cu_seqlens = inputs(LENGTHS, V=9, dtype=dtype)
    options = options | {"dropout_p": 0.3, "seed": SEED}
    tolerance = 5e-6 if dtype == torch.float32 else 2e-2
    with config.patch(kernels="cpu"):
        results = run(leaves, cu_seqlens, **options)
    for result, expected in zip(results, exact(leaves, cu_seqlens, **options), strict=True):
        assert error(result, expected) < tolerance


def test_the_mean_over_seeds_is_attention_without_dropout(kernels):
    leaves, cu_seqlens = inputs([5, 12], H=2, H_kv=1, K=4)
    draws = [run(leaves, cu_seqlens, dropout_p=0.4, seed=torch.tensor(n)) for n in range(400)]
    for number, expected in enumerate(run(leaves, cu_seqlens)):  # all are linear in what is kept
        results = torch.stack([draw[number] for draw in draws]).double()
        deviations = (results.mean(0) - expected) / (results.std(0) / 20 + 1e-6)
        assert deviations.abs().max() < 5


def test_all_or_nothing(kernels):
    leaves, cu_seqlens = inputs(LENGTHS)
    assert all(map(torch.equal, run(leaves, cu_seqlens, dropout_p=0.0, seed=SEED), run(leaves, cu_seqlens)))
    assert not any(result.any() for result in run(leaves, cu_seqlens, dropout_p=1.0))


def test_one_document_changes_no_bit_of_another(kernels):
    leaves, cu_seqlens = inputs(LENGTHS)
    clean = run(leaves, cu_seqlens, dropout_p=0.3, seed=SEED)
    begin, end = cu_seqlens[4:6].tolist()
    with torch.no_grad():
        for leaf in leaves:
            leaf[:, begin:end] = float("nan")
    others = [t for t in range(sum(LENGTHS)) if not begin <= t < end]
    for a, b in zip(clean, run(leaves, cu_seqlens, dropout_p=0.3, seed=SEED), strict=True):
        assert torch.equal(a[:, others], b[:, others])


# ---- derivatives -----------------------------------------------------------------------------------------------------


def test_gradients_are_exact():
    leaves, cu_seqlens = inputs([0, 2, 4], K=3, V=2, dtype=torch.float64)
    options = {"cu_seqlens": cu_seqlens, "dropout_p": 0.3, "seed": SEED}
    assert gradcheck(lambda *leaves: varlen_attention(*leaves, **options), leaves, check_forward_ad=True)
    assert gradgradcheck(lambda *leaves: varlen_attention(*leaves, **options), leaves, fast_mode=True)


# ---- seeds -----------------------------------------------------------------------------------------------------------


def test_without_a_seed_torchs_generator_says_what_is_dropped(kernels):
    leaves, cu_seqlens = inputs(LENGTHS)
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append([varlen_attention(*leaves, cu_seqlens=cu_seqlens, dropout_p=0.3) for _ in range(2)])
    assert all(map(torch.equal, outs[0], outs[1]))
    assert not torch.equal(outs[0][0], outs[2][0])
    assert not torch.equal(*outs[0])


@pytest.mark.parametrize("backend", [None, "aot_eager", "inductor"])
def test_a_checkpoint_computes_again_what_was_dropped(backend):
    leaves, cu_seqlens = inputs([5, 12])

    def attend(q, k, v):
        return varlen_attention(q, k, v, cu_seqlens=cu_seqlens, dropout_p=0.5).sin()

    def step(q, k, v):
        return checkpoint(attend, q, k, v, use_reentrant=False)

    compiled = torch.compile(step, backend=backend, fullgraph=True) if backend else step
    q, k, v = leaves
    torch.manual_seed(3)
    out = compiled(q, k, v)
    # out is a function of v alone through sin of something linear in v: then dv says which weights were kept.
    (dv,) = torch.autograd.grad(out.sum(), v)
    moved = v.detach() + 1e-3
    torch.manual_seed(3)
    change = (compiled(q, k, moved.requires_grad_()) - out).sum().item()
    assert change == pytest.approx(1e-3 * dv.sum().item(), rel=0.02, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout_p": -0.1}, "dropout_p must be between 0 and 1; got -0.1"),
        ({"dropout_p": 1.5}, "dropout_p must be between 0 and 1; got 1.5"),
        ({"dropout_p": 0.5, "seed": torch.tensor([1, 2])}, r"seed must be one int64 number; got \(2,\)"),
        ({"dropout_p": 0.5, "seed": torch.tensor(1.0)}, "seed must be one int64 number; got .* torch.float32"),
        ({"dropout_p": 0.5, "mask_mod": lambda b, h, i, j: i >= j}, "not taken with mask_mod"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    leaves, cu_seqlens = inputs([5])
    with pytest.raises(ValueError, match=message):
        varlen_attention(*leaves, cu_seqlens=cu_seqlens, **options)
