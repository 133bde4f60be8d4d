"""The causal convolution beyond what all mixers promise: kernels against the specification, memory, the compiler."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from budget import skip_if_interpreted
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from packc.ops import causal_conv1d, cpu_library
from packc.ops.causal_conv1d import triton_op

D, W = 19, 4  # no multiple of a vector, so that every row has a partial one


def size(kernels, full, interpreted):
    """Triton's interpreter takes milliseconds a tile."""
    return interpreted if kernels == "triton" else full


def inputs(lengths, D=D, W=W, dtype=torch.float32, seed=0):
    """x, weight, bias, initial_state as leaves, and cu_seqlens."""
    torch.manual_seed(seed)
    shapes = (1, sum(lengths), D), (D, W), (D,), (len(lengths), D, W - 1)
    leaves = [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    return leaves, torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def run(leaves, cu_seqlens=None, activation="silu", seed=1):
    """out, final_state and the gradients of all leaves for random gradients of both."""
    x, weight, bias, initial_state = leaves
    out, final_state = causal_conv1d(
        x,
        weight,
        bias,
        activation=activation,
        cu_seqlens=cu_seqlens,
        initial_state=initial_state,
        output_final_state=True,
    )
    torch.manual_seed(seed)
    grads = [torch.randn(t.shape, dtype=torch.float64).to(t.dtype) for t in (out, final_state)]
    return [out, final_state, *torch.autograd.grad([out, final_state], leaves, grads)]


def exact(leaves, cu_seqlens=None, activation="silu"):
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    return run(wide, cu_seqlens, activation)


def error(result, expected):
    """The largest one, relative to the largest entry."""
    if not result.numel():
        return 0.0
    return ((result.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 3, 4, 6, 9])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_values_and_gradients_are_those_of_the_specification(kernels, width, activation):
    if (width, activation) not in ((4, "silu"), (6, None)):
        skip_if_interpreted(kernels)
    leaves, cu_seqlens = inputs([0, 1, 2, 40, 1, size(kernels, 300, 33), 0], W=width)
    for result, expected in zip(
        run(leaves, cu_seqlens, activation), exact(leaves, cu_seqlens, activation), strict=True
    ):
        assert error(result, expected) < 2e-6


def test_the_specification_is_a_padded_conv1d_per_document():
    leaves, _ = inputs([50], dtype=torch.float64)
    x, weight, bias, initial_state = leaves
    history = torch.cat([initial_state, x.transpose(1, 2)], 2)
    expected = F.silu(F.conv1d(history, weight[:, None], bias, groups=D)).transpose(1, 2)
    torch.testing.assert_close(run(leaves)[0], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_plain_torch(kernels, dtype):
    leaves, _ = inputs([size(kernels, 200, 70)], dtype=dtype)
    x, weight, bias, initial_state = leaves
    padded = torch.cat([initial_state, x.transpose(1, 2)], 2)
    plain = F.silu(F.conv1d(padded, weight[:, None], bias, groups=D)).transpose(1, 2)
    torch.manual_seed(1)
    grad = torch.randn(plain.shape, dtype=torch.float64).to(dtype)
    plain = [plain, *torch.autograd.grad(plain, leaves, grad)]
    ours = run_out_only(leaves, grad)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    for mine, theirs, expected in zip(ours, plain, run_out_only(wide, grad.double()), strict=True):
        assert mine.dtype == theirs.dtype
        # The interpreter cuts bits off where everybody else rounds.
        assert error(mine, expected) <= (4 if kernels == "triton" else 2) * error(theirs, expected)


def run_out_only(leaves, grad):
    x, weight, bias, initial_state = leaves
    out = causal_conv1d(x, weight, bias, activation="silu", initial_state=initial_state)
    return [out, *torch.autograd.grad(out, leaves, grad)]


def test_dtypes_mix_as_under_autocast(kernels):
    (x, weight, bias, initial_state), cu_seqlens = inputs([5, 9])
    leaves = [x.detach().bfloat16().requires_grad_(), weight, bias, initial_state]
    results = run(leaves, cu_seqlens)
    assert [t.dtype for t in results] == [torch.bfloat16, torch.float32, torch.bfloat16, *[torch.float32] * 3]
    for result, expected in zip(results[3:], exact(leaves, cu_seqlens)[3:], strict=True):
        assert error(result, expected) < 1e-2  # only dout is rounded


def run_states(leaves, cu_seqlens, activation):
    x, weight, bias, initial_state = leaves
    options = {"activation": activation, "cu_seqlens": cu_seqlens, "initial_state": initial_state}
    return causal_conv1d(x, weight, bias, **options, output_final_state=True)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [1] * 9])
def test_empty_packs_and_single_tokens(kernels, lengths):
    leaves, cu_seqlens = inputs(lengths)
    for result, expected in zip(run(leaves, cu_seqlens), exact(leaves, cu_seqlens), strict=True):
        assert result.shape == expected.shape
        assert error(result, expected) < 2e-6


def test_rows_of_a_batch_are_documents(kernels):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 21, D), torch.randn(D, W), torch.randn(D)
    cu_seqlens = torch.arange(4) * 21
    rows = causal_conv1d(x, weight, bias, output_final_state=True)
    packed = causal_conv1d(x.view(1, 63, D), weight, bias, cu_seqlens=cu_seqlens, output_final_state=True)
    torch.testing.assert_close(rows[0].flatten(0, 1), packed[0][0], rtol=0, atol=0)
    torch.testing.assert_close(rows[1], packed[1], rtol=0, atol=0)


def test_swish_is_silu():
    (x, weight, bias, _), _ = inputs([5])
    assert torch.equal(*(causal_conv1d(x, weight, bias, activation=name) for name in ("silu", "swish")))


# ---- documents -------------------------------------------------------------------------------------------------------


LENGTHS = [5, 1, 29]


def gradients(leaves, cu_seqlens, dout, dfinal):
    return torch.autograd.grad(run_states(leaves, cu_seqlens, "silu"), leaves, [dout, dfinal])


def test_each_gradient_ends_at_documents(kernels):
    """A gradient that flows out of one document only is that of the document alone."""
    leaves, cu_seqlens = inputs(LENGTHS)
    x, weight, bias, initial_state = leaves
    for n, (begin, end) in enumerate(pairwise(cu_seqlens.tolist())):
        dout, dfinal = torch.zeros_like(x), torch.zeros_like(initial_state)
        dout[:, begin:end], dfinal[n] = torch.randn_like(dout[:, begin:end]), torch.randn_like(dfinal[n])
        dx, dweight, dbias, dstate = gradients(leaves, cu_seqlens, dout, dfinal)
        alone = [leaf.detach().requires_grad_() for leaf in (x[:, begin:end], weight, bias, initial_state[n : n + 1])]
        expected = gradients(alone, None, dout[:, begin:end], dfinal[n : n + 1])
        assert dx[:, :begin].count_nonzero() == dx[:, end:].count_nonzero() == 0
        assert dstate[:n].count_nonzero() == dstate[n + 1 :].count_nonzero() == 0
        for packed, one in zip((dx[:, begin:end], dweight, dbias, dstate[n : n + 1]), expected, strict=True):
            assert error(packed, one.double()) < 2e-6


# ---- memory ----------------------------------------------------------------------------------------------------------

VIEWS = {
    "rows of a projection": lambda x: torch.cat([x, x], 2)[..., : x.shape[2]],
    "channel-first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "channel-first half": lambda x: torch.cat([x, x], 2).transpose(1, 2).contiguous().chunk(2, 1)[1].transpose(1, 2),
    "every other one": lambda x: x.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, ::2, ::2],
    "one row for all": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_inputs_are_those_of_contiguous_ones(kernels, view, dtype):
    if dtype == torch.float32 or view not in ("channel-first half", "every other one"):
        skip_if_interpreted(kernels)
    leaves, cu_seqlens = inputs([3, 0, size(kernels, 70, 24)], dtype=dtype)
    strided = VIEWS[view](leaves[0].detach()).requires_grad_()
    assert not strided.is_contiguous()
    dense = strided.detach().contiguous().requires_grad_()
    results = [run([x, *leaves[1:]], cu_seqlens) for x in (strided, dense)]
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        if kernels in ("triton", "gpu") and i in (3, 4):  # dweight, dbias: other strides, other tiles to sum over
            assert error(a, b.double()) <= 4 * torch.finfo(dtype).eps
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("view", VIEWS)
def test_strided_inputs_are_read_in_place(view):
    if not cpu_library.load("causal_conv1d"):
        pytest.skip("no C++ compiler")
    leaves, cu_seqlens = inputs([300], D=40)
    leaves[0] = VIEWS[view](leaves[0].detach()).requires_grad_()
    out = causal_conv1d(*leaves[:3], cu_seqlens=cu_seqlens)
    dout = VIEWS[view](torch.randn_like(out))
    with profile(record_shapes=True) as record:
        causal_conv1d(*leaves[:3], cu_seqlens=cu_seqlens)
        torch.ops.packc.causal_conv1d_bwd(dout, None, *leaves[:3], None, cu_seqlens, None)
    touching = {event.name for event in record.events() if list(out.shape) in event.input_shapes}
    assert touching
    assert not any(name.startswith("aten::") for name in touching), touching


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 35])
def test_what_lies_around_an_input_in_memory_is_never_seen(kernels, length):
    """Tails of tiles: no length is a multiple of all of them, and all that is around a tensor is NaN."""
    if length not in (17, 35):
        skip_if_interpreted(kernels)

    def surrounded(x):
        around = torch.full([size + 14 for size in x.shape], float("nan"), dtype=x.dtype)
        inside = around[tuple(slice(7, -7) for _ in x.shape)]
        inside.copy_(x.detach())
        return inside.requires_grad_()

    leaves, _ = inputs([length], D=3)
    dout, dfinal = torch.randn(1, length, 3), torch.randn(1, 3, W - 1)
    results = []
    for memory in (lambda x: x, surrounded):
        mine = [memory(leaf) for leaf in leaves]
        values = run_states(mine, None, "silu")
        results.append([*values, *torch.autograd.grad(values, mine, [memory(dout).detach(), memory(dfinal).detach()])])
    for dense, inside in zip(*results, strict=True):
        assert torch.equal(dense, inside)


@pytest.mark.parametrize("strides", [(2**31 + 8, 4, 1), (8, 2**30 + 8, 1), (1, 2, 2**30 + 8)])
def test_offsets_past_two_to_the_31_elements(kernels, strides):
    """Of an input whose 4 GiB are reserved, and touched where it has elements only."""
    if kernels == "reference":
        pytest.skip("torch's own indexing")
    shape = (2, 3, 3)
    try:
        far = torch.empty_strided(shape, strides, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("no 6 GiB of address space")
    near = torch.randn(shape).bfloat16()
    far.copy_(near)
    weight = torch.randn(3, W)
    results = [causal_conv1d(x, weight, output_final_state=True) for x in (near, far)]
    results = [
        (*result, *torch.ops.packc.causal_conv1d_bwd(x, None, x, weight, None, "silu", None, torch.ones(2, 3, W - 1)))
        for result, x in zip(results, (near, far), strict=True)
    ]
    assert all(map(torch.equal, *results))


@pytest.mark.gpu
def test_outputs_past_two_to_the_31_elements(kernels):
    if kernels != "gpu":
        pytest.skip("needs 20 GiB of a GPU")
    T, D = 2**20 + 5, 2**11 + 64
    leaves, _ = inputs([5], D=D, dtype=torch.bfloat16)
    x, weight, bias, initial_state = leaves
    long = torch.cat([torch.zeros(1, T - 5, D, dtype=x.dtype), x], 1).detach()
    ends = torch.tensor([0, T - 5, T], dtype=torch.int32)
    states = torch.cat([initial_state, initial_state]).detach()
    out = causal_conv1d(long, weight, bias, cu_seqlens=ends, initial_state=states)
    assert torch.equal(out[:, -5:], causal_conv1d(x, weight, bias, initial_state=initial_state))
    dx = torch.ops.packc.causal_conv1d_bwd(long, None, long, weight, bias, None, ends, states)[0]
    alone = torch.ops.packc.causal_conv1d_bwd(x, None, x, weight, bias, None, None, initial_state)[0]
    assert torch.equal(dx[:, -5:], alone)


def test_sizes_of_tiles_do_not_matter(kernels, monkeypatch):
    if kernels not in ("triton", "gpu"):
        pytest.skip("tiles of Triton kernels")
    leaves, cu_seqlens = inputs([3, 0, 40, 7])
    expected = run(leaves, cu_seqlens)
    for sizes in ((8, 2, 16, 4), (1, 16, 64, 4)):
        for tuner in (triton_op._forward, triton_op._backward):
            monkeypatch.setattr(tuner, "configs", triton_op._configs(sizes))
            monkeypatch.setattr(tuner, "cache", {})
        results = run(leaves, cu_seqlens)
        for i in (0, 1, 2, 5):  # out, final_state, dx, dinitial_state
            assert torch.equal(results[i], expected[i])
        torch.testing.assert_close(results[3:5], expected[3:5], rtol=1e-5, atol=1e-5)


def test_nothing_but_the_inputs_is_kept_for_the_backward(kernels):
    leaves, cu_seqlens = inputs([7, 9])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        run_states(leaves, cu_seqlens, "silu")
    assert set(kept) == {t.data_ptr() for t in (*leaves, cu_seqlens)}


# ---- the op ----------------------------------------------------------------------------------------------------------


def test_flops_are_counted_forward_and_backward():
    leaves, cu_seqlens = inputs([10, 20])
    with FlopCounterMode(display=False) as counter:
        run(leaves, cu_seqlens)
    assert counter.get_total_flops() == (1 + 3) * 2 * 30 * D * W


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_step_serves_every_length_and_document_count(backend):
    @torch.compile(fullgraph=True, backend=backend)
    def step(x, weight, bias, cu_seqlens, initial_state):
        return run_states((2 * x, weight, bias, initial_state), cu_seqlens, "silu")

    for i, lengths in enumerate(([5, 3, 4], [9, 8], [1, 2, 3, 30], [7, 2])):
        leaves, cu_seqlens = inputs(lengths)
        x, weight, bias, initial_state = leaves
        # One compile for the first shape, one when the sizes turn dynamic.
        with torch._dynamo.config.patch(error_on_recompile=i > 1):
            results = step(x, weight, bias, cu_seqlens, initial_state)
        expected = run_states((2 * x, weight, bias, initial_state), cu_seqlens, "silu")
        grads = [torch.randn_like(t) for t in expected]
        torch.testing.assert_close(results, expected)
        torch.testing.assert_close(
            torch.autograd.grad(results, leaves, grads), torch.autograd.grad(expected, leaves, grads)
        )


def test_a_length_that_only_a_run_can_tell_compiles():
    step = torch.compile(run_states, fullgraph=True, backend="aot_eager")
    for lengths in ([4, 5], [2, 3, 1], [1]):
        leaves, cu_seqlens = inputs(lengths)
        for tensor, dim in ((leaves[0], 1), (cu_seqlens, 0), (leaves[3], 0)):
            torch._dynamo.decorators.mark_unbacked(tensor, dim)
        with torch._dynamo.config.patch(error_on_recompile=lengths != [4, 5]):
            results = step(leaves, cu_seqlens, "silu")
        torch.testing.assert_close(results, run_states(leaves, cu_seqlens, "silu"))
        torch.autograd.grad(results[0].sum(), leaves)


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.empty(5, D)}, ValueError, r"x must be \(B, L, D\) and floating; got \(5, 19\)"),
        ({"x": torch.ones(1, 5, D, dtype=torch.long)}, TypeError, "x must be .* floating; got .* torch.int64"),
        ({"weight": torch.empty(D + 1, W)}, ValueError, r"weight must be \(D, W\) with D = 19 .* got \(20, 4\)"),
        ({"weight": torch.empty(D, 0)}, ValueError, r"weight .* W >= 1; got \(19, 0\)"),
        ({"weight": torch.ones(D, W, dtype=torch.int32)}, TypeError, "weight must be floating; got .* torch.int32"),
        ({"bias": torch.empty(1, D)}, ValueError, r"bias must be \(D,\) with D = 19; got \(1, 19\)"),
        ({"activation": "gelu"}, ValueError, "activation must be None, .* not 'gelu'"),
        ({"cu_seqlens": torch.tensor([0, 5]).float()}, TypeError, "cu_seqlens must be int32 or int64"),
        ({"initial_state": torch.empty(2, D, 3)}, ValueError, r"initial_state .* \(1, 19, 3\); got \(2, 19, 3\)"),
    ],
)
def test_bad_arguments_are_named_with_their_shapes(change, error, message):
    arguments = {"x": torch.empty(1, 5, D), "weight": torch.empty(D, W)} | change
    with pytest.raises(error, match=message):
        causal_conv1d(**arguments)
