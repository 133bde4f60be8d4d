"""Spans of queries, each with keys of its own: against a dense mask, beside others, and as flash attention has them."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode
from varlen_attention_data import error, offsets, with_grads

from packc import config
from packc.ops import varlen_attention
from packc.ops.varlen_attention import cuda, spans_cuda, spans_reference

spans_op = torch.ops.packc.attention_spans.default

LENGTHS = [(3, 5), (0, 4), (4, 0), (70, 130), (130, 70), (1, 1), (2, 200)]
SEEN = [(True, None), (False, None), (True, 1), (True, 70), (False, 7)]


@pytest.fixture(params=["reference", "cpu"])
def kernels(request):
    with config.patch(kernels=request.param):
        yield request.param


def spans_of(lengths, gap=0, shift=0):
    """Queries and keys of these lengths, ``gap`` apart; a span's last query is at its last key, but for ``shift``."""
    spans, q, k = [], gap, gap
    for queries, keys in lengths:
        spans.append([q, q + queries, k, k + keys, k + keys - q - queries + shift])
        q, k = q + queries + gap, k + keys + gap
    return torch.tensor(spans)


def inputs(lengths, dtype=torch.float32, H=4, G=2, K=16, V=9, gap=0):
    torch.manual_seed(0)
    queries, keys = (gap + sum(each[i] + gap for each in lengths) for i in (0, 1))
    shapes = (queries, H, K), (keys, G, K), (keys, G, V)
    return [torch.randn(1, *shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def run(leaves, spans, causal, window, dropout_p=0.0, seed=None):
    return with_grads(spans_op(*leaves, None, None, spans, causal, 0.3, window, dropout_p, seed, None)[0], leaves)


def dense(leaves, spans, causal, window):
    """All queries with all keys, in the leaves' dtype."""
    q, k, v = leaves
    i, j = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])
    visible = torch.zeros(q.shape[1], k.shape[1], dtype=torch.bool)
    for begin, end, first, last, shift in spans.tolist():
        ahead = j - i - shift
        seen = (begin <= i) & (i < end) & (first <= j) & (j < last) & (ahead.abs() < (window or 10**6))
        visible |= seen & (ahead <= 0 if causal else True)
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * 0.3
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0)
    return with_grads(torch.einsum("bhij,bjhd->bihd", weights, v), leaves)


@pytest.mark.parametrize(("causal", "window"), SEEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients_are_as_exact_as_a_dense_mask_s(kernels, causal, window, dtype):
    leaves, spans = inputs(LENGTHS, dtype, gap=2), spans_of(LENGTHS, gap=2)
    exact = dense([x.detach().double().requires_grad_() for x in leaves], spans, causal, window)
    found, plain = run(leaves, spans, causal, window), dense(leaves, spans, causal, window)
    for mine, theirs, expected in zip(found, plain, exact, strict=True):
        assert mine.dtype == dtype
        assert mine.is_contiguous()
        assert error(mine, expected) <= 2 * error(theirs, expected) + 2e-6


@pytest.mark.parametrize("shift", [-90, -9, 5, 500])
def test_queries_may_be_anywhere_among_their_keys(kernels, shift):
    lengths = [(70, 130), (5, 9)]
    leaves, spans = inputs(lengths), spans_of(lengths, shift=shift)
    for causal, window in SEEN:
        for mine, expected in zip(
            run(leaves, spans, causal, window), dense(leaves, spans, causal, window), strict=True
        ):
            assert error(mine, expected) < 2e-6


def test_what_sees_no_key_or_is_in_no_span_is_zero_whatever_it_holds(kernels):
    lengths = [(4, 0), (5, 2), (0, 3)]
    leaves, spans = inputs(lengths, gap=1), spans_of(lengths, gap=1)
    outside, unseen = [0, 1, 2, 3, 4, 5, 11, 12], [0, 1, 4, 5, 6, 7, 8]
    with torch.no_grad():
        for x, tokens in zip(leaves, (outside, unseen, unseen), strict=True):
            x[:, tokens] = float("nan")
    out, dq, dk, dv = run(leaves, spans, True, None)
    first = [6, 7, 8]  # of the second span's queries, which has fewer keys
    for x, tokens in ((out, outside + first), (dq, outside + first), (dk, unseen), (dv, unseen)):
        assert not x[:, tokens].any()
        assert x.isfinite().all()
    assert out[:, [9, 10]].all()


@pytest.mark.parametrize(("causal", "window"), SEEN)
def test_a_span_has_the_same_bits_whatever_stands_beside_it(causal, window):
    leaves, spans = inputs(LENGTHS, gap=1), spans_of(LENGTHS, gap=1)
    out, *grads = run(leaves, spans, causal, window)
    torch.manual_seed(1)
    dout = torch.randn(out.shape, dtype=torch.float64).float()
    for begin, end, first, last, shift in spans.tolist():
        q, k, v = (
            x.detach()[:, a:b].requires_grad_()
            for x, a, b in zip(leaves, (begin, first, first), (end, last, last), strict=True)
        )
        one = torch.tensor([[0, end - begin, 0, last - first, shift + begin - first]])
        alone = spans_op(q, k, v, None, None, one, causal, 0.3, window, 0.0, None, None)[0]
        assert torch.equal(alone, out[:, begin:end])
        of_alone = torch.autograd.grad(alone, (q, k, v), dout[:, begin:end])
        for a, whole, part in zip(of_alone, grads, (slice(begin, end), *[slice(first, last)] * 2), strict=True):
            assert torch.equal(a, whole[:, part])


def test_no_bit_depends_on_the_number_of_threads():
    lengths = [(0, 3), (130, 200)]
    leaves, spans, threads, results = inputs(lengths), spans_of(lengths), torch.get_num_threads(), []
    try:
        for number in (1, 8):  # more than groups: then heads are shared out
            torch.set_num_threads(number)
            results.append(run(leaves, spans, True, None))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


def test_nan_in_one_span_changes_no_bit_of_another():
    lengths = [(3, 5), (20, 30), (7, 7)]
    leaves, spans = inputs(lengths), spans_of(lengths)
    clean = run(leaves, spans, False, None)
    with torch.no_grad():
        for leaf, begin, end in zip(leaves, (3, 5, 5), (23, 35, 35), strict=True):
            leaf[:, begin:end] = float("nan")
    dirty = run(leaves, spans, False, None)
    for a, b, begin, end in zip(clean, dirty, (3, 3, 5, 5), (23, 23, 35, 35), strict=True):
        assert torch.equal(a[:, :begin], b[:, :begin])
        assert torch.equal(a[:, end:], b[:, end:])
        assert not b[:, begin:end].isfinite().any()


def test_all_implementations_drop_the_same_weights():
    leaves, spans, seed = inputs(LENGTHS), spans_of(LENGTHS), torch.tensor(5)
    results = []
    for kernels in ("reference", "cpu"):
        with config.patch(kernels=kernels):
            results.append(run(leaves, spans, True, None, 0.3, seed))
    for a, b in zip(*results, strict=True):
        assert error(a, b.double()) < 2e-6
    assert error(results[0][0], run(leaves, spans, True, None)[0].double()) > 0.1


def test_blocks_of_the_reference_drop_what_it_drops_at_once(monkeypatch):
    leaves, spans, seed = inputs([(20, 30)]), spans_of([(20, 30)]), torch.tensor(5)
    with config.patch(kernels="reference"):
        whole = run(leaves, spans, True, 9, 0.3, seed)
        monkeypatch.setattr(spans_reference, "_BLOCK", 7)
        torch.testing.assert_close(run(leaves, spans, True, 9, 0.3, seed), whole)


def test_what_is_kept_for_the_backward_is_linear_in_the_length(kernels):
    leaves, spans = inputs([(70, 200)]), spans_of([(70, 200)])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = spans_op(*leaves, None, None, spans, True, 0.3, None, 0.0, None, None)[0]
    assert [t.shape for t in kept] == [*[x.shape for x in leaves], out.shape, (4, 70), spans.shape]


@pytest.mark.parametrize(("causal", "window"), SEEN[:3])
def test_gradients_of_gradients_are_exact(causal, window):
    lengths = [(2, 3), (2, 0), (3, 2)]
    leaves, spans = inputs(lengths, torch.float64, H=2, G=1, K=2, V=2), spans_of(lengths)

    def attention(q, k, v):
        return spans_op(q, k, v, None, None, spans, causal, 0.3, window, 0.0, None, None)[0]

    assert gradcheck(attention, leaves)
    assert gradgradcheck(attention, leaves, fast_mode=True)


@pytest.mark.parametrize(("causal", "window"), SEEN[:3])
def test_opcheck(kernels, causal, window):
    lengths = [(2, 3), (4, 4)]
    leaves, options = inputs(lengths, gap=1), (spans_of(lengths, gap=1), causal, 0.3, window, 0.0, None, 2.0)
    torch.library.opcheck(spans_op, (*leaves, None, None, *options))
    bias = torch.randn(1, 9, 4, 3).requires_grad_()
    for sinks in (torch.randn(4), torch.randn(1, 9, 4)):
        more = sinks.requires_grad_(), bias
        torch.library.opcheck(spans_op, (*leaves, *more, *options))
    q, k, v = (x.detach() for x in leaves)
    more = [x.detach() for x in more]
    out, logsumexp = spans_op(q, k, v, *more, *options)
    torch.library.opcheck(
        torch.ops.packc.attention_spans_bwd.default,
        (out, q, k, v, *more, out, logsumexp, *options),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize(
    ("causal", "window", "pairs"),
    [(False, None, 600), (True, None, 20 * 30 - 190), (True, 4, 80), (False, 4, 140)],
)
def test_flops_are_those_of_one_span(causal, window, pairs):
    leaves = inputs([(20, 30)])
    with FlopCounterMode(display=False) as counter:
        run(leaves, spans_of([(20, 30)]), causal, window)
    assert counter.get_total_flops() == 2 * 4 * pairs * ((16 + 9) + (3 * 16 + 2 * 9))


@pytest.mark.parametrize(
    "spans",
    [
        [[0, 3, 0, 4, 0], [2, 5, 4, 8, 0]],
        [[0, 3, 0, 4, 0], [3, 5, 3, 8, 0]],
        [[0, 5, 0, 9, 0]],
        [[-1, 5, 0, 8, 0]],
        [[4, 2, 0, 8, 0]],
    ],
)
def test_spans_that_meet_or_end_outside_are_refused(kernels, spans):
    with pytest.raises(ValueError, match="spans must rise, one behind the other"):
        run(inputs([(5, 8)]), torch.tensor(spans), True, None)


# ---- documents of two rows: varlen_attention with cu_seqlens_k -------------------------------------------------------

ROWS = [3, 0, 4, 70, 130], [5, 4, 0, 130, 70]


@pytest.mark.parametrize(("causal", "window"), SEEN)
def test_a_document_sees_the_one_of_its_number_from_its_last_key_back(kernels, causal, window):
    lengths = list(zip(*ROWS, strict=True))
    leaves = inputs(lengths)
    options = {"causal": causal, "window": window, "scale": 0.3}
    cu_seqlens, cu_seqlens_k = map(offsets, ROWS)
    found = with_grads(varlen_attention(*leaves, cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k, **options), leaves)
    for mine, expected in zip(found, dense(leaves, spans_of(lengths), causal, window), strict=True):
        assert error(mine, expected) < 2e-6
    assert not found[0][:, 3:7].any()  # of the third document, which has no keys


def test_equal_documents_are_those_of_one_row():
    leaves, cu_seqlens = inputs([(3, 3), (70, 70)]), offsets([3, 70])
    for options in ({}, {"causal": False}, {"window": 7}, {"dropout_p": 0.4, "seed": torch.tensor(3)}):
        one = with_grads(varlen_attention(*leaves, cu_seqlens=cu_seqlens, **options), leaves)
        options["cu_seqlens_k"] = cu_seqlens.long()
        two = with_grads(varlen_attention(*leaves, cu_seqlens=cu_seqlens, **options), leaves)
        assert all(map(torch.equal, one, two))


def test_rows_meet_documents_as_documents_do():
    lengths = [(4, 5), (4, 2), (4, 9)]
    q, k, v = inputs(lengths)
    cu_seqlens_k = offsets([5, 2, 9])
    packed = varlen_attention(q, k, v, cu_seqlens=offsets([4] * 3), cu_seqlens_k=cu_seqlens_k, causal=False)
    rows = torch.ops.packc.cross_attention(q.view(3, 4, 4, 16), k, v, None, cu_seqlens_k, None, 0.0, None)
    assert torch.equal(rows.flatten(0, 1)[None], packed)


def test_a_compiled_step_serves_documents_of_all_lengths():
    step = torch.compile(varlen_attention, fullgraph=True, backend="aot_eager")
    for n, rows in enumerate(([[5, 3, 4], [2, 8, 1]], [[9, 8], [1, 6]], [[1, 2, 3, 30], [7, 7, 1, 9]])):
        leaves, (a, b) = inputs(list(zip(*rows, strict=True))), map(offsets, rows)
        with torch._dynamo.config.patch(error_on_recompile=n > 1):
            out = step(*leaves, cu_seqlens=a, cu_seqlens_k=b)
        expected = varlen_attention(*leaves, cu_seqlens=a, cu_seqlens_k=b)
        for mine, theirs in zip(with_grads(out, leaves), with_grads(expected, leaves), strict=True):
            assert torch.equal(mine, theirs)


def test_opcheck_of_what_documents_become():
    (q, k, v), (a, b) = inputs([(2, 3), (4, 1)]), (offsets([2, 4]), offsets([3, 1]))
    torch.library.opcheck(torch.ops.packc.document_spans.default, (a, b, 6, 4))
    arguments = (q.detach(), k.detach(), v.detach(), a, b, None, 0.0, None)
    torch.library.opcheck(torch.ops.packc.cross_attention.default, arguments, test_utils=("test_schema",))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cu_seqlens_k": torch.tensor([0, 4, 8, 8])}, ValueError, r"as long as cu_seqlens \(3,\); got \(4,\)"),
        ({"cu_seqlens_k": torch.tensor([0, 4, 9])}, ValueError, "cu_seqlens_k must rise from 0 to L = 8"),
        ({"cu_seqlens_k": torch.tensor([0.0, 4, 8])}, TypeError, "cu_seqlens_k must be int32 or int64"),
        ({"cu_seqlens": torch.tensor([0, 4, 8])}, ValueError, "cu_seqlens must rise from 0 to L = 5"),
        ({"mask_mod": lambda b, h, i, j: i == j}, ValueError, "cu_seqlens_k is not taken with mask_mod"),
        ({"k": torch.empty(1, 8, 2, 9)}, ValueError, r"k must be .* \(1, T_k, H_kv, 16\); got \(1, 8, 2, 9\)"),
        ({"v": torch.empty(1, 7, 2, 9)}, ValueError, r"v must be .* \(1, 8, 2, V\); got \(1, 7, 2, 9\)"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    q, k, v = inputs([(5, 8)])
    given = {"cu_seqlens": torch.tensor([0, 2, 5]), "cu_seqlens_k": torch.tensor([0, 4, 8])}
    arguments = {"q": q, "k": k, "v": v, **given} | change
    with pytest.raises(error, match=message):
        varlen_attention(**arguments)


# ---- on CUDA ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def flash(monkeypatch):
    """In the place of torch's flash attention: the same, documents end to end; gives how many queries each call had."""
    calls = []

    def spans(starts, keys):
        rows = [starts[:-1], starts[1:], keys[:-1], keys[1:], keys[1:] - starts[1:]]
        return torch.stack(rows, 1)

    def seen(is_causal, window_size_left=None, window_size_right=None):
        return (is_causal or window_size_right == 0), (None if window_size_left is None else window_size_left + 1)

    def forward(q, k, v, starts, keys, longest, longest_keys, *, dropout_p, return_debug_mask, scale, **how):
        calls.append(q.shape[0])
        assert (longest, longest_keys) == (int(starts.diff().max()), int(keys.diff().max()))
        causal, window = seen(**how)
        given = q[None], k[None], v[None], None, None, spans(starts, keys), causal, scale, window, 0.0, None, None
        out, logsumexp = spans_reference.attention_spans(*given)
        return out[0], logsumexp, None, None, None

    def backward(dout, q, k, v, out, logsumexp, starts, keys, *_, dropout_p, rng_state, unused, scale, **how):
        causal, window = seen(**how)
        assert torch.equal(
            logsumexp, forward(q, k, v, starts, keys, *_, dropout_p=0, return_debug_mask=0, scale=scale, **how)[1]
        )
        given = dout[None], q[None], k[None], v[None], None, None, out, logsumexp, spans(starts, keys)
        options = causal, scale, window, 0.0, None, None
        return tuple(x[0] for x in spans_reference.attention_spans_bwd(*given, *options)[:3])

    monkeypatch.setattr(cuda, "_flash", forward)
    monkeypatch.setattr(cuda, "_flash_bwd", backward)
    monkeypatch.setattr(cuda, "takes_flash", lambda q, v: True)
    return calls


@pytest.mark.parametrize(("causal", "window"), SEEN)
def test_flash_attention_gets_runs_of_spans(flash, causal, window):
    lengths = [(3, 5), (4, 4), (0, 2), (2, 0), (1, 7)]
    spans = spans_of(lengths)
    spans[:, 0:2], spans[:, 4] = spans[:, 0:2] + 1, spans[:, 4] - 1
    q, k, v = (x.detach() for x in inputs([*lengths, (2, 1)], torch.bfloat16))
    options = None, None, spans, causal, 0.3, window, 0.0, None, None
    found, expected = (each.attention_spans(q, k, v, *options) for each in (spans_cuda, spans_reference))
    inside = slice(1, 8)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1][:, inside], expected[1][:, inside])
    assert flash == [7, 1]  # queries: the first two spans end to end, and the last
    dout = torch.randn_like(found[0])
    torch.testing.assert_close(
        spans_cuda.attention_spans_bwd(dout, q, k, v, *options[:2], *found, *options[2:]),
        spans_reference.attention_spans_bwd(dout, q, k, v, *options[:2], *expected, *options[2:]),
    )


@pytest.mark.parametrize("shape", [(4,), (1, 9, 4)], ids=str)
def test_runs_of_flash_attention_leave_sinks_their_share(flash, monkeypatch, shape):
    lengths = [(3, 5), (0, 2), (1, 7)]
    spans = spans_of(lengths)
    spans[2:, 0:2], spans[2:, 4] = spans[2:, 0:2] + 1, spans[2:, 4] - 1  # a query in no span
    q, k, v = (x.detach() for x in inputs([*lengths, (5, 0)]))
    options = spans, True, 0.3, None, 0.0, None, None
    given = q, k, v, torch.randn(shape), None
    found, expected = (each.attention_spans(*given, *options) for each in (spans_cuda, spans_reference))
    torch.testing.assert_close(found[0], expected[0])
    assert flash == [3, 1]
    dout = torch.randn_like(found[0])
    monkeypatch.setattr(cuda, "flash_bwd", lambda dout, *qkv_and_more: map(torch.zeros_like, qkv_and_more[:3]))
    torch.testing.assert_close(
        spans_cuda.attention_spans_bwd(dout, *given, *found, *options)[3],
        spans_reference.attention_spans_bwd(dout, *given, *expected, *options)[3],
    )


@pytest.mark.parametrize("lengths", [[(3, 5), (5, 3)], [(3, 5)]])
def test_flash_attention_gets_no_spans_of_another_form(flash, lengths):
    spans = spans_of(lengths, shift=0 if len(lengths) > 1 else 1)
    q, k, v = (x.detach() for x in inputs(lengths, torch.bfloat16))
    options = None, None, spans, True, 0.3, None, 0.0, None, None
    found, expected = (each.attention_spans(q, k, v, *options) for each in (spans_cuda, spans_reference))
    assert all(map(torch.equal, found, expected))
    spans_cuda.attention_spans(q, k, v, None, None, spans, False, 0.3, None, 0.3, torch.tensor(1), None)  # nor dropout
    assert flash == []
    # Where all see all, it is all the same.
    spans_cuda.attention_spans(q, k, v, None, None, spans, False, 0.3, None, 0.0, None, None)
    assert flash == [sum(queries for queries, _ in lengths)]


@pytest.mark.gpu
@pytest.mark.parametrize(("causal", "window"), SEEN)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gpu_values_and_gradients_are_those_of_the_reference(causal, window, dtype):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    lengths = [(3, 5), (70, 130), (4, 4), (64, 300)]
    leaves = [x.detach().cuda().requires_grad_() for x in inputs(lengths, dtype)]
    found = run(leaves, spans_of(lengths).cuda(), causal, window)
    with config.patch(kernels="reference"):
        expected = run(leaves, spans_of(lengths).cuda(), causal, window)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
