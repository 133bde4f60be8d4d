"""What varlen_attention takes from torch: block masks, FlexAttention, private ops; and, with a GPU, what runs there."""

import gc
import weakref
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.attention.flex_attention
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from varlen_attention_data import assert_as_exact_as_plain_torch, inputs, offsets, plain, run

from packc import config
from packc.ops import autograd, varlen_attention
from packc.ops.varlen_attention import cpu, cuda, document_mask, flex, op, reference
from packc.ops.varlen_attention.sinks import by_token, gradient
from packc.ops.varlen_attention.with_mask_mod import differentiated_again

SEEN = [(True, None), (False, None), (True, 1), (True, 100), (True, 300), (False, 1), (False, 100)]
LENGTHS = [0, 128, 100, 1, 1, 300, 0, 60]


@pytest.fixture
def eager_flex(monkeypatch):
    """FlexAttention as it runs on CPU with no kernel; gives the counter of what Dynamo compiles."""
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(flex_attention, dynamic=True, backend=counter)
    monkeypatch.setattr(flex, "compiled", lambda: compiled)
    return counter


@pytest.fixture
def builds(monkeypatch):
    """One entry for every block mask made."""
    made, build = [], document_mask.build
    monkeypatch.setattr(document_mask, "build", lambda *args: made.append(args) or build(*args))
    return made


# ---- block masks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [LENGTHS, [128, 256], [5], [1000], [127, 1, 129, 3]], ids=str)
@pytest.mark.parametrize("seen", SEEN, ids=str)
def test_tiles_are_those_that_flex_finds_itself(lengths, seen):
    T = sum(lengths)
    mask = document_mask.block_mask(offsets(lengths), T, *seen)
    expected = create_block_mask(mask.mask_mod, 1, 1, T, T, device="cpu")
    assert torch.equal(mask.to_dense(), expected.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(mask, name), getattr(expected, name))
    assert mask.shape == expected.shape


def test_a_block_mask_is_made_once_per_batch(builds, eager_flex):
    leaves, cu_seqlens = inputs([100, 60])
    q, k, v = (leaf.detach() for leaf in leaves)
    for _ in range(3):
        flex.varlen_attention(q, k, v, None, cu_seqlens, True, None, None, None)
        flex.masked(q, k, v, cu_seqlens, True, None, None, lambda b, h, q_idx, kv_idx: kv_idx >= 0)
    assert len(builds) == 2  # one of them has no full tiles
    flex.varlen_attention(q, k, v, None, cu_seqlens, True, None, 7, None)
    assert len(builds) == 3
    flex.varlen_attention(q, k, v, None, offsets([100, 60]), True, None, None, None)
    assert len(builds) == 4


def test_a_block_mask_is_made_again_for_offsets_written_to(builds, eager_flex):
    (q, k, v), cu_seqlens = inputs([100, 60])
    flex.varlen_attention(q, k, v, None, cu_seqlens, True, None, None, None)
    cu_seqlens[1] = 30
    out, _ = flex.varlen_attention(q, k, v, None, cu_seqlens, True, None, None, None)
    assert len(builds) == 2
    torch.testing.assert_close(out, reference.varlen_attention(q, k, v, None, None, cu_seqlens, True, None, None)[0])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_block_mask_is_forgotten_with_its_offsets(dtype):
    cu_seqlens = offsets([100, 60], dtype)
    mask = weakref.ref(document_mask.block_mask(cu_seqlens, 160, True, None))
    document_mask.longest(cu_seqlens, 160)
    assert mask() is not None
    del cu_seqlens
    gc.collect()
    assert mask() is None


def test_offsets_of_inference_mode_are_read_anew():
    with torch.inference_mode():
        cu_seqlens = offsets([100, 60])
        assert document_mask.longest(cu_seqlens, 160) == 100
        cu_seqlens[1] = 30
        assert document_mask.longest(cu_seqlens, 160) == 130


@pytest.mark.parametrize("compiled", [False, True])
def test_layers_of_a_batch_share_what_is_made_forward_and_backward(monkeypatch, compiled):
    made = []

    class Counting:
        @staticmethod
        def varlen_attention(q, k, v, sinks, bias, cu_seqlens, *args):
            document_mask.once_per_batch(cu_seqlens, "counted", lambda: made.append("forward"))
            return cpu.varlen_attention(q, k, v, sinks, bias, cu_seqlens, *args)

        @staticmethod
        def varlen_attention_bwd(dout, q, k, v, sinks, bias, out, logsumexp, cu_seqlens, *args):
            document_mask.once_per_batch(cu_seqlens, "counted", lambda: made.append("backward"))
            return cpu.varlen_attention_bwd(dout, q, k, v, sinks, bias, out, logsumexp, cu_seqlens, *args)

    monkeypatch.setitem(op._IMPLEMENTATIONS, "cpu", Counting)

    def layers(q, k, v, cu_seqlens):
        for _ in range(3):
            q = varlen_attention(q, k, v, cu_seqlens=cu_seqlens)
        return q.sum()

    step = torch.compile(layers, fullgraph=True) if compiled else layers
    leaves, cu_seqlens = inputs([10, 6])
    step(*leaves, cu_seqlens).backward()
    assert made == ["forward"]


# ---- FlexAttention ---------------------------------------------------------------------------------------------------


# Sinks, and the cap of scores.
SINKS = torch.linspace(-1, 2, 4)
OF_TOKENS = torch.linspace(-1, 2, 4 * sum(LENGTHS)).view(1, -1, 4)
MORE = [(None, None), (SINKS, None), (OF_TOKENS, None), (SINKS, 1.5)]


@pytest.mark.parametrize("seen", SEEN, ids=str)
@pytest.mark.parametrize("sizes", [(16, 16), (9, 5)])
def test_flex_gives_what_the_specification_gives(eager_flex, seen, sizes):
    (causal, window), (leaves, cu_seqlens) = seen, inputs(LENGTHS, 4, 2, *sizes)
    for sinks, softcap in MORE if seen == SEEN[-1] else MORE[:1]:
        results = flex.varlen_attention(*leaves, sinks, cu_seqlens, causal, None, window, softcap)
        options = cu_seqlens, causal, None, window, 0.0, None, softcap
        torch.testing.assert_close(results, reference.varlen_attention(*leaves, sinks, None, *options))
    assert all(map(torch.Tensor.is_contiguous, results))


def test_flex_takes_a_mask_mod(eager_flex):
    leaves, cu_seqlens = inputs(LENGTHS)
    q, k, v = (leaf.detach() for leaf in leaves)

    def mask_mod(b, h, q_idx, kv_idx):
        return ((q_idx - kv_idx) % 3 == h) & (kv_idx != 140)

    results = [by.masked(q, k, v, cu_seqlens, True, 0.3, None, mask_mod) for by in (flex, reference)]
    torch.testing.assert_close(*results)


def test_the_gradients_of_flex_are_those_of_the_specification(eager_flex, monkeypatch):
    # Flex refuses to train on CPU for want of a kernel, not of a formula.
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *_: None)
    leaves, cu_seqlens = inputs(LENGTHS, 4, 2, 9, 5)
    q, k, v = (leaf.detach() for leaf in leaves)
    cases = [*product(SEEN, MORE[:1]), *product(SEEN[-1:], MORE[1:])]
    for (causal, window), (sinks, softcap) in cases:
        out, logsumexp = flex.varlen_attention(q, k, v, sinks, cu_seqlens, causal, None, window, softcap)
        dout, kept, seen = torch.randn_like(out), (out, logsumexp, cu_seqlens), (causal, None, window)
        with autograd.below_autograd():  # as a kernel of the op is called
            results = flex.varlen_attention_bwd(dout, q, k, v, sinks, *kept, *seen, softcap)
        options = *kept, *seen, 0.0, None, softcap
        *expected, of_sinks, _ = reference.varlen_attention_bwd(dout, q, k, v, sinks, None, *options)
        torch.testing.assert_close(results, tuple(expected), rtol=1e-4, atol=1e-5)
        if sinks is not None:
            found = gradient(by_token(dout, out, logsumexp, sinks), sinks)
            torch.testing.assert_close(found, of_sinks, rtol=1e-4, atol=1e-5)


def test_second_derivatives_of_flex_are_those_of_the_specification(eager_flex, monkeypatch):
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *_: None)
    leaves, cu_seqlens = inputs([5, 1, 4])
    options = {"causal": True, "scale": 0.3, "window": None, "mask_mod": lambda b, h, i, j: j % 3 == 0}
    by_flex, plain = (partial(by.masked, cu_seqlens=cu_seqlens, **options) for by in (flex, reference))
    values = []
    for attention in (partial(differentiated_again, by_flex, plain), plain):
        q, k, v = leaves
        weight = torch.linspace(0.5, 2, 10).view(1, 10, 1, 1).requires_grad_()
        slope = torch.autograd.grad((attention(q, k * q[:, :, :2], v) * weight).sin().sum(), (q, v), create_graph=True)
        values.append(torch.autograd.grad(sum(grad.square().sum() for grad in slope), (q, k, v, weight)))
        assert all(x.isfinite().all() for x in values[-1])
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-4)


def test_one_compilation_of_flex_serves_all_lengths_and_masks(eager_flex):
    counts = set()
    for lengths in ([200, 57], [3, 0, 400], [129], [90, 300, 5]):
        leaves, cu_seqlens = inputs(lengths)
        for causal, window in SEEN:
            flex.varlen_attention(*leaves, None, cu_seqlens, causal, None, window, None)
            counts.add(eager_flex.frame_count)
    assert len(counts) == 1


# ---- private ops -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overload", [cuda._flash, cuda._flash_bwd], ids=str)
def test_private_ops_take_what_they_took(overload):
    expected = {
        cuda._flash: "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask scale "
        "window_size_left window_size_right",
        cuda._flash_bwd: "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p is_causal "
        "rng_state unused scale window_size_left window_size_right",
    }[overload].split()
    arguments = overload._schema.arguments
    assert [argument.name for argument in arguments][: len(expected)] == expected
    assert all(argument.has_default_value() for argument in arguments[len(expected) :])


@pytest.mark.parametrize("sizes", [(64, 64), (19, 7)])
@pytest.mark.parametrize("window", [None, 5])
def test_flash_attention_of_cuda_takes_our_arguments(sizes, window):
    (q, k, v), cu_seqlens = inputs([20, 30], 6, 2, *sizes, dtype=torch.bfloat16, device="meta")
    lengths = cuda.Lengths(cu_seqlens, cu_seqlens, 30, 30)
    out, logsumexp = cuda.flash(q, k, v, lengths, True, None, window)
    assert out.shape == (1, 50, 6, sizes[1])
    assert (logsumexp.shape, logsumexp.dtype) == ((6, 50), torch.float32)
    grads = cuda.flash_bwd(out, q, k, v, out, logsumexp, lengths, True, None, window)
    assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]
    assert all(grad.is_contiguous() for grad in (out, logsumexp, *grads))


# ---- with a GPU ------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


OPTIONS = [{}, {"causal": False}, {"window": 1}, {"window": 100, "scale": -0.2}, {"window": 9, "causal": False}]


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("sizes", [(64, 64), (19, 7), (300, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])  # fp32 and heads of 300: Flex
def test_gpu_values_and_gradients_are_as_exact_as_plain_torch(gpu, options, sizes, dtype):
    leaves, cu_seqlens = inputs(LENGTHS, 6, 2, *sizes, dtype=dtype, device="cuda")
    assert_as_exact_as_plain_torch(leaves, cu_seqlens, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[], [0, 0], [1] * 9, [5]], ids=str)
def test_gpu_empty_rows_and_single_tokens(gpu, dtype, lengths):
    leaves, cu_seqlens = inputs(lengths, dtype=dtype, device="cuda")
    results = run(leaves, cu_seqlens)
    assert [tensor.shape for tensor in results[1:]] == [leaf.shape for leaf in leaves]
    if sum(lengths):
        torch.testing.assert_close(results, plain(leaves, cu_seqlens), rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_takes_a_mask_mod(gpu, dtype):
    leaves, cu_seqlens = inputs(LENGTHS, dtype=dtype, device="cuda")
    options = {"mask_mod": lambda b, h, q_idx, kv_idx: (q_idx - kv_idx) % 3 == h}
    results = run(leaves, cu_seqlens, **options)
    with config.patch(kernels="reference"):
        expected = run(leaves, cu_seqlens, **options)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(results, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
def test_gpu_flash_keeps_nan_in_its_document(gpu):
    leaves, cu_seqlens = inputs(LENGTHS, dtype=torch.bfloat16, device="cuda")
    begin, end = cu_seqlens[2:4].tolist()
    clean = run(leaves, cu_seqlens)
    with torch.no_grad():
        for leaf in leaves:
            leaf[:, begin:end] = float("nan")
    others = [t for t in range(sum(LENGTHS)) if not begin <= t < end]
    for i, (a, b) in enumerate(zip(clean, run(leaves, cu_seqlens), strict=True)):
        if i == 1:  # dq, which flash attention sums in any order
            torch.testing.assert_close(a[:, others], b[:, others], rtol=1e-2, atol=1e-2)
        else:
            assert torch.equal(a[:, others], b[:, others])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_a_compiled_step_makes_its_mask_once(gpu, builds, dtype):
    @torch.compile(fullgraph=True)
    def step(q, k, v, cu_seqlens):
        for _ in range(3):
            q = varlen_attention(q, k, v, cu_seqlens=cu_seqlens)
        return q.sum()

    for i, lengths in enumerate(([200, 57], [3, 400, 99], [500, 1], [77, 88, 99])):
        leaves, cu_seqlens = inputs(lengths, dtype=dtype, device="cuda")
        with torch._dynamo.config.patch(error_on_recompile=i > 1):
            step(*leaves, cu_seqlens).backward()
        assert len(builds) == (i + 1 if dtype == torch.float32 else 0)
