"""Attention within documents: kernels against the specification, eager against compiled, what is refused."""

import operator

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode
from varlen_attention_data import assert_as_exact_as_plain_torch, error, exact, inputs, offsets, plain, run

from packc import config
from packc.ops import varlen_attention

LENGTHS = [0, 1, 2, 40, 40, 1, 300, 0]
SEEN = [
    {},
    {"causal": False, "scale": 0.7},
    {"window": 1},
    {"window": 7},
    {"window": 40},
    {"window": 1000, "scale": -0.3},
    {"scale": 0.0},
    {"causal": False, "window": 1},
    {"causal": False, "window": 7},
    {"causal": False, "window": 290},
]


@pytest.fixture(params=["reference", "cpu"])
def kernels(request):
    with config.patch(kernels=request.param):
        yield request.param


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", SEEN, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients_are_as_exact_as_plain_torch(kernels, options, dtype):
    leaves, cu_seqlens = inputs(LENGTHS, dtype=dtype)
    assert_as_exact_as_plain_torch(leaves, cu_seqlens, **options)


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (5, 1)])
@pytest.mark.parametrize("sizes", [(1, 1), (19, 19), (33, 8), (8, 33), (300, 300)])
def test_any_heads_of_any_size(kernels, heads, sizes):
    leaves, cu_seqlens = inputs([3, 0, 70], *heads, *sizes)
    assert_as_exact_as_plain_torch(leaves, cu_seqlens)


@pytest.mark.parametrize("options", SEEN, ids=str)
def test_the_specification_is_torch_s_attention_on_each_document(options):
    leaves, cu_seqlens = inputs([1, 2, 20, 7], dtype=torch.float64)
    torch.testing.assert_close(run(leaves, cu_seqlens, **options), plain(leaves, cu_seqlens, **options))


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 2, "scale": 0.7}], ids=str)
def test_gradients_are_exact(options):
    leaves, cu_seqlens = inputs([0, 1, 2, 4], H=4, H_kv=2, K=3, V=2, dtype=torch.float64)
    assert gradcheck(lambda *leaves: varlen_attention(*leaves, cu_seqlens=cu_seqlens, **options), leaves)


def test_heads_of_a_group_stand_next_to_each_other(kernels):
    (q, k, v), cu_seqlens = inputs([9], H=4, H_kv=2)
    out = varlen_attention(q, k, v, cu_seqlens=cu_seqlens)
    for h in range(4):
        heads = q[:, :, h : h + 1], *(tensor[:, :, h // 2 : h // 2 + 1] for tensor in (k, v))
        torch.testing.assert_close(out[:, :, h : h + 1], varlen_attention(*heads, cu_seqlens=cu_seqlens))


@pytest.mark.parametrize("H_kv", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_bit_depends_on_the_number_of_threads(H_kv, dtype):
    leaves, cu_seqlens = inputs([0, 130], H_kv=H_kv, V=9, dtype=dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 8):  # more than groups: then heads are shared out, if there are more
            torch.set_num_threads(number)
            results.append(run(leaves, cu_seqlens, window=70))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


def test_a_softmax_over_nothing_but_minus_infinity_is_nan(kernels):
    (q, k, v), cu_seqlens = inputs([3, 70], H=1, H_kv=1)
    with torch.no_grad():
        q[:], k[:, :67] = 1, -torch.inf  # of the last document, all keys of the first chunk
    out = varlen_attention(q, k, v, cu_seqlens=cu_seqlens)
    assert out[:, :67].isnan().all()
    torch.testing.assert_close(out[:, 67], v[:, 67])


def test_float64_takes_the_reference_whatever_is_forced():
    leaves, cu_seqlens = inputs([4, 5], dtype=torch.float64)
    with config.patch(kernels="cpu"):
        forced = run(leaves, cu_seqlens)
    assert all(map(torch.equal, forced, run(leaves, cu_seqlens)))


# ---- mask_mod --------------------------------------------------------------------------------------------------------


def same_parity(b, h, q_idx, kv_idx):
    return ((q_idx - kv_idx) % 2 == 0) | (h == 0)


def every_third(b, h, q_idx, kv_idx):
    return kv_idx % 3 == 0


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 3}, {"window": 2, "causal": False}], ids=str)
def test_mask_mod_hides_more(options):
    (q, k, v), cu_seqlens = inputs([0, 5, 8], H_kv=4, dtype=torch.float64)
    token = torch.arange(13)
    allowed = same_parity(0, torch.arange(4)[:, None, None], token[:, None], token)
    document = (token >= 5).long()
    visible = allowed & (document[:, None] == document)
    if options.get("causal", True):
        visible &= token[:, None] >= token
    visible &= (token[:, None] - token).abs() < options.get("window", 13)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * 16**-0.5
    expected = torch.einsum("bhts,bshd->bthd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)
    out = varlen_attention(q, k, v, cu_seqlens=cu_seqlens, mask_mod=same_parity, **options)
    torch.testing.assert_close(out, expected)


def test_mask_mod_is_asked_about_positions_in_the_row_and_may_hide_all():
    leaves, cu_seqlens = inputs([5, 4])
    out, *grads = run(leaves, cu_seqlens, mask_mod=every_third)
    assert torch.equal(out[:, 5], torch.zeros_like(out[:, 5]))  # the second document's first key that is left is 6
    assert torch.equal(out[:, 6, :2], leaves[2][:, 6, :1].expand(1, 2, 16))
    assert all(grad.isfinite().all() for grad in grads)
    assert torch.equal(grads[1][:, [1, 2, 4, 5, 7, 8]], torch.zeros(1, 6, 2, 16))


def test_gradients_are_exact_with_a_mask_mod():
    leaves, cu_seqlens = inputs([2, 4], K=3, dtype=torch.float64)
    options = {"cu_seqlens": cu_seqlens, "mask_mod": every_third}
    assert gradcheck(lambda *leaves: varlen_attention(*leaves, **options), leaves)
    assert gradgradcheck(lambda *leaves: varlen_attention(*leaves, **options), leaves, fast_mode=True)


def test_a_mask_mod_breaks_the_graph():
    leaves, cu_seqlens = inputs([5, 8])

    compiled = []

    def backend(gm, inputs):
        compiled.extend(node.target for node in gm.graph.nodes if node.op.startswith("call"))
        return gm

    @torch.compile(backend=backend)
    def step(q, k, v):
        return 2 * varlen_attention(q, k, v, cu_seqlens=cu_seqlens, mask_mod=same_parity)

    torch.testing.assert_close(
        step(*leaves), 2 * varlen_attention(*leaves, cu_seqlens=cu_seqlens, mask_mod=same_parity)
    )
    assert compiled == [operator.mul]  # and nothing of the attention
    with pytest.raises(torch._dynamo.exc.Unsupported, match="mask_mod is a Python function, which no op can take"):
        torch.compile(step._torchdynamo_orig_callable, backend="eager", fullgraph=True)(*leaves)


# ---- memory ----------------------------------------------------------------------------------------------------------

VIEWS = {
    "heads of one projection": lambda x: torch.cat([x, x], 2)[:, :, : x.shape[2]],
    "head-first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every other token": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "one head for all": lambda x: x[:, :, :1].expand_as(x),
    "every other element": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "token last": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "one token for all": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("options", [{}, {"window": 9}], ids=str)
def test_strided_inputs_are_those_of_contiguous_ones(kernels, view, options):
    leaves, cu_seqlens = inputs([3, 0, 70])
    strided = [VIEWS[view](leaf.detach()).requires_grad_() for leaf in leaves]
    dense = [leaf.detach().contiguous().requires_grad_() for leaf in strided]
    assert not any(leaf.is_contiguous() for leaf in strided)
    for a, b in zip(run(strided, cu_seqlens, **options), run(dense, cu_seqlens, **options), strict=True):
        assert torch.equal(a, b)


def test_strided_gradients_are_those_of_contiguous_ones(kernels):
    leaves, cu_seqlens = inputs([3, 0, 70], V=9)
    leaves, options = [*leaves, None, None], (True, None, None, 0.0, None, None)
    out, logsumexp = torch.ops.packc.varlen_attention(*leaves, cu_seqlens, *options)
    dout = torch.randn_like(out)
    expected = torch.ops.packc.varlen_attention_bwd(dout, *leaves, out, logsumexp, cu_seqlens, *options)
    for view in (VIEWS["head-first"], VIEWS["every other element"]):
        results = torch.ops.packc.varlen_attention_bwd(view(dout), *leaves, out, logsumexp, cu_seqlens, *options)
        assert all(map(torch.equal, results, expected))


@pytest.mark.parametrize("view", VIEWS)
def test_strided_inputs_are_read_in_place(view):
    leaves, cu_seqlens = inputs([300], H_kv=4)
    strided = [VIEWS[view](leaf.detach()) for leaf in leaves]
    with config.patch(kernels="cpu"), profile(record_shapes=True) as record:
        varlen_attention(*strided, cu_seqlens=cu_seqlens)
    copies = ("aten::copy_", "aten::clone", "aten::contiguous")
    assert not [each for each in record.events() if each.name in copies and len(each.input_shapes[0]) == 4]


def test_what_is_kept_for_the_backward_is_linear_in_the_length(kernels):
    leaves, cu_seqlens = inputs([70, 200], V=9)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = varlen_attention(*leaves, cu_seqlens=cu_seqlens)
    assert [tuple(t.shape) for t in kept] == [tuple(t.shape) for t in (*leaves, cu_seqlens, out)] + [(4, 270)]
    assert kept[-1].dtype == torch.float32
    assert {t.data_ptr() for t in kept[:5]} == {t.data_ptr() for t in (*leaves, cu_seqlens, out)}


# ---- the op ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        (True, None, None, 0.0, None, None),
        (False, 0.7, None, 0.0, None, None),
        (True, None, 3, 0.0, None, None),
        (True, None, None, 0.3, torch.tensor(5), 2.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("more", [(), (4,), (1, 11, 4)], ids=["", "sinks", "sinks of each token"])
def test_opcheck(kernels, options, dtype, more):
    (q, k, v), cu_seqlens = inputs([2, 0, 9], K=3, V=5, dtype=dtype)
    sinks, bias = (torch.randn(more), torch.randn(1, 11, 4, 3).to(dtype)) if more else (None, None)
    arguments = q.transpose(1, 2).contiguous().transpose(1, 2), k, v, sinks, bias, cu_seqlens, *options
    torch.library.opcheck(torch.ops.packc.varlen_attention.default, arguments)
    out, logsumexp = torch.ops.packc.varlen_attention(*arguments)
    dout, q, k, v, out, logsumexp = (tensor.detach() for tensor in (out, q, k, v, out, logsumexp))
    torch.library.opcheck(
        torch.ops.packc.varlen_attention_bwd.default,
        (dout, q, k, v, sinks, bias, out, logsumexp, cu_seqlens, *options),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize(
    ("options", "pairs"),
    [
        ({}, 30 * 31 // 2),
        ({"causal": False}, 900),
        ({"window": 4}, 4 * 30 - 6),
        ({"window": 4, "causal": False}, 7 * 30 - 12),
    ],
    ids=str,
)
def test_flops_are_those_of_one_document(options, pairs):
    leaves, cu_seqlens = inputs([10, 20], K=16, V=5)
    with FlopCounterMode(display=False) as counter:
        run(leaves, cu_seqlens, **options)
    assert counter.get_total_flops() == 2 * 4 * pairs * ((16 + 5) + (3 * 16 + 2 * 5))


@pytest.mark.parametrize("options", [{}, {"window": 4}], ids=str)
def test_a_compiled_step_serves_every_length_and_document_count(options):
    @torch.compile(fullgraph=True)
    def step(q, k, v, cu_seqlens):
        return varlen_attention(2 * q, k, v, cu_seqlens=cu_seqlens, **options).sin()

    for i, lengths in enumerate(([5, 3, 4], [9, 8], [1, 2, 3, 30], [7, 2])):
        leaves, cu_seqlens = inputs(lengths)
        # One compile for the first shape, one when the sizes turn dynamic.
        with torch._dynamo.config.patch(error_on_recompile=i > 1):
            results = [out := step(*leaves, cu_seqlens), *torch.autograd.grad(out.sum(), leaves)]
        out = varlen_attention(2 * leaves[0], *leaves[1:], cu_seqlens=cu_seqlens, **options).sin()
        torch.testing.assert_close(results, [out, *torch.autograd.grad(out.sum(), leaves)])


def test_a_length_that_only_a_run_can_tell_compiles():
    step = torch.compile(varlen_attention, fullgraph=True, backend="aot_eager")
    for lengths in ([4, 5], [2, 3, 1], [1]):
        leaves, cu_seqlens = inputs(lengths)
        for tensor, dim in (*((leaf, 1) for leaf in leaves), (cu_seqlens, 0)):
            torch._dynamo.decorators.mark_unbacked(tensor, dim)
        with torch._dynamo.config.patch(error_on_recompile=lengths != [4, 5]):
            out = step(*leaves, cu_seqlens=cu_seqlens, window=2)
        torch.testing.assert_close(out, varlen_attention(*leaves, cu_seqlens=cu_seqlens, window=2))
        torch.autograd.grad(out.sum(), leaves)


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.empty(1, 5, 16)}, ValueError, r"q must be \(1, T, H, K\) and floating; got \(1, 5, 16\)"),
        ({"q": torch.ones(1, 5, 4, 16, dtype=torch.long)}, TypeError, "q must be .* floating; got .* torch.int64"),
        ({"q": torch.empty(2, 5, 4, 16)}, ValueError, r"q must be one packed row .* not \(2, 5, 4, 16\)"),
        ({"q": torch.empty(1, 5, 4, 0)}, ValueError, r"q must have H >= 1 and K >= 1; got \(1, 5, 4, 0\)"),
        ({"k": torch.empty(1, 6, 2, 16)}, ValueError, r"k must be .* \(1, 5, H_kv, 16\); got \(1, 6, 2, 16\)"),
        ({"k": torch.empty(1, 5, 3, 16)}, ValueError, r"4 heads .* multiple of k's H_kv; got \(1, 5, 3, 16\)"),
        ({"v": torch.empty(1, 5, 4, 16)}, ValueError, r"v must be .* \(1, 5, 2, V\); got \(1, 5, 4, 16\)"),
        ({"v": torch.empty(1, 5, 2, 16).half()}, TypeError, "v must be of q's dtype torch.float32; got .*float16"),
        ({"cu_seqlens": None}, TypeError, "cu_seqlens must be a tensor"),
        ({"cu_seqlens": torch.tensor([0.0, 5.0])}, TypeError, "cu_seqlens must be int32 or int64"),
        ({"cu_seqlens": torch.tensor([0, 3, 2, 5])}, ValueError, "cu_seqlens must rise from 0 to L = 5"),
        ({"window": 0}, ValueError, "window must be at least 1; got 0"),
        ({"softcap": 0.0}, ValueError, "softcap must be above 0; got 0.0"),
        ({"sinks": torch.empty(2)}, ValueError, r"\(H,\) = \(4,\) or \(1, T, H\) = \(1, 5, 4\), .*; got \(2,\)"),
        ({"sinks": torch.empty(1, 4, 4)}, ValueError, r"sinks must be .* = \(1, 5, 4\), and floating; got \(1, 4, 4\)"),
        ({"sinks": torch.empty(5, 4)}, ValueError, r"sinks must be .* = \(1, 5, 4\), and floating; got \(5, 4\)"),
        ({"sinks": torch.ones(4, dtype=torch.long)}, ValueError, "sinks must be .* floating; got .* torch.int64"),
        ({"relative_bias": torch.empty(1, 5, 2, 3)}, ValueError, r"\(1, 5, 4, R\) and floating; got \(1, 5, 2, 3\)"),
        ({"relative_bias": torch.empty(1, 5, 4, 0)}, ValueError, r"relative_bias must be .*; got \(1, 5, 4, 0\)"),
        ({"sinks": torch.empty(4), "mask_mod": same_parity}, ValueError, "sinks is not taken with mask_mod"),
        ({"softcap": 1.0, "mask_mod": same_parity}, ValueError, "softcap is not taken with mask_mod"),
    ],
)
def test_bad_arguments_are_named_with_their_shapes(change, error, message):
    q, k, v = torch.empty(1, 5, 4, 16), torch.empty(1, 5, 2, 16), torch.empty(1, 5, 2, 16)
    arguments = {"q": q, "k": k, "v": v, "cu_seqlens": torch.tensor([0, 5])} | change
    with pytest.raises(error, match=message):
        varlen_attention(**arguments)


def test_a_choice_that_cannot_be_honoured_is_refused():
    (q, k, v), cu_seqlens = inputs([5])
    with config.patch(kernels="triton"), pytest.raises(ValueError, match=r'"triton": .* torch.float32 tensor on cpu'):
        varlen_attention(q, k, v, cu_seqlens=cu_seqlens)
    with config.patch(kernels="cpu"), pytest.raises(ValueError, match='"cpu": varlen_attention takes mask_mod'):
        varlen_attention(q, k, v, cu_seqlens=cu_seqlens, mask_mod=same_parity)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [1] * 9])
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 2}], ids=str)
def test_empty_rows_and_single_tokens(kernels, lengths, options):
    leaves, cu_seqlens = inputs(lengths)
    for wide in (cu_seqlens, offsets(lengths, torch.int64)):
        for result, expected in zip(run(leaves, wide, **options), exact(leaves, wide, **options), strict=True):
            assert result.shape == expected.shape
            assert error(result, expected) < 1e-6
