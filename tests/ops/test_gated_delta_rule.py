"""The gated delta rule beyond what all mixers promise: its two kinds of gate, its sizes, its numerics."""

import pytest
import torch
import torch.nn.functional as F
from budget import skip_if_interpreted
from mixers import MIXERS, assert_close, exactly, run
from selective_scan_data import offsets, relative_error
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.qwen3_next import modeling_qwen3_next

from packc.ops import gated_delta_rule

MIXER = MIXERS["gated_delta_rule"]

gates = pytest.mark.parametrize("per_channel", [False, True], ids=["per head", "per channel"])


def make(B=1, L=70, H=2, G=None, K=8, V=8, per_channel=False, g=None):
    G = G or H
    k = F.normalize(torch.randn(B, L, G, K), dim=-1)
    shape = (B, L, H, K) if per_channel else (B, L, H)
    g = F.logsigmoid(torch.randn(shape) + 2) if g is None else torch.full(shape, g)
    return {"q": torch.randn(B, L, G, K), "k": k, "v": torch.randn(B, L, H, V), "g": g, "beta": torch.rand(B, L, H)}


# ---- what it computes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"])
@pytest.mark.parametrize("G", [2, 4])
def test_equals_transformers(kernels, name, G):
    if kernels == "triton" and ("recurrent" in name or G == 4):
        pytest.skip("interpreted, the other has to do")
    function = getattr(modeling_qwen3_next, name)
    inputs, state = make(B=2, L=130, H=4, G=G, K=16, V=24), torch.randn(2, 4, 16, 24)
    unnormalised = inputs | {"k": inputs["k"] * (1 + torch.rand(2, 130, G, 1))}
    for given, normalise in [(inputs, False), (unnormalised, True)]:
        # Later than transformers 5.20 the function repeats them itself, before that the model does.
        a_head_each = given | {name: given[name].repeat_interleave(4 // G, dim=2) for name in "qk"}
        out, final = function(
            *a_head_each.values(), initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=normalise
        )
        if normalise:
            given = given | {name: F.normalize(given[name], dim=-1) for name in "qk"}
        results = gated_delta_rule(**given, initial_state=state, output_final_state=True)
        assert_close(dict(enumerate(results)), {0: out, 1: final})


def test_gradients_equal_those_of_transformers(kernels):
    inputs = {name: x.requires_grad_() for name, x in make(L=130, K=16, V=24).items()}
    out, _ = modeling_qwen3_next.torch_chunk_gated_delta_rule(*inputs.values())
    weight = torch.randn_like(out)
    expected = torch.autograd.grad(out, list(inputs.values()), weight)
    results = torch.autograd.grad(gated_delta_rule(**inputs), list(inputs.values()), weight)
    assert_close(dict(zip(inputs, results, strict=True)), dict(zip(inputs, expected, strict=True)))


@gates
def test_equals_the_update_as_the_papers_write_it(kernels, per_channel):
    inputs = make(L=66, H=1, K=5, V=3, per_channel=per_channel)
    q, k, v, g, beta = (x[0, :, 0].double() for x in inputs.values())
    state, out = torch.zeros(5, 3, dtype=torch.float64), []
    for t in range(66):
        forget = g[t].exp() * torch.eye(5, dtype=torch.float64)
        overwrite = torch.eye(5, dtype=torch.float64) - beta[t] * torch.outer(k[t], k[t])
        state = overwrite @ forget @ state + beta[t] * torch.outer(k[t], v[t])
        out.append(state.T @ q[t])
    assert relative_error(gated_delta_rule(**inputs, scale=1.0)[0, :, 0], torch.stack(out)) < 1e-6


def test_one_gate_for_all_channels_equals_as_many_that_are_alike(kernels):
    skip_if_interpreted(kernels)
    inputs, state, documents = make(L=150, K=16, V=24), torch.randn(3, 2, 16, 24), offsets([3, 130, 17])
    alike = inputs | {"g": inputs["g"][..., None].expand(1, 150, 2, 16)}
    one, many = run(MIXER, inputs, documents, state), run(MIXER, alike, documents, state)
    many["dg"] = many["dg"].sum(-1)
    assert_close(many, one, 5e-6)


@gates
def test_heads_share_queries_and_keys_in_consecutive_groups(kernels, per_channel):
    inputs = make(L=9, H=4, G=2, per_channel=per_channel)
    every_head = inputs | {name: inputs[name].repeat_interleave(2, 2) for name in "qk"}
    shared, own = run(MIXER, inputs), run(MIXER, every_head)
    for name in ("dq", "dk"):
        own[name] = own[name].unflatten(2, (2, 2)).sum(3)
    assert_close(shared, own, 2e-6)


@gates
@pytest.mark.parametrize(("K", "V"), [(1, 1), (33, 130), (64, 64), (128, 128), (17, 256), (256, 16)])
def test_any_size_of_heads(kernels, per_channel, K, V):
    if not per_channel or (K, V) != (33, 130):
        skip_if_interpreted(kernels)
    inputs, state = make(L=82, H=1, K=K, V=V, per_channel=per_channel), torch.randn(2, 1, K, V)
    assert_close(run(MIXER, inputs, offsets([1, 81]), state), exactly(MIXER, inputs, offsets([1, 81]), state))


def test_threads_that_share_the_columns_of_a_state_change_no_bit(kernels):
    if kernels != "cpu":
        pytest.skip("only there threads share them")
    inputs, state, threads = make(L=200, K=16, V=40), torch.randn(1, 2, 16, 40), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = run(MIXER, inputs, None, state)
        torch.set_num_threads(4)
        assert_close(run(MIXER, inputs, None, state), first, 0)
    finally:
        torch.set_num_threads(threads)
    assert_close(first, exactly(MIXER, inputs, None, state))


# ---- numerics --------------------------------------------------------------------------------------------------------


@gates
@pytest.mark.parametrize("g", [0.0, -1e-7, -1e-3, -1.0, -30.0, -100.0, -1e4, -1e30, -torch.inf])
def test_decays_from_none_to_complete(kernels, per_channel, g):
    if kernels == "triton" and g in (-1e-7, -1e-3, -30.0, -1e4):
        pytest.skip("interpreted, the others have to do")
    inputs, state = make(L=82, K=8, per_channel=per_channel, g=g), torch.randn(1, 2, 8, 8)
    results, exact = run(MIXER, inputs, None, state), exactly(MIXER, inputs, None, state)
    if g < -50:  # Nothing comes through: fp64 still tells how little.
        for name in ("dg", "dinitial_state"):
            assert results.pop(name).abs().max() < 1e-20
            assert exact.pop(name).abs().max() < 1e-20
    assert_close(results, exact)


def test_some_channels_forget_at_once_and_others_never(kernels):
    # The decays of a chunk span e^-1900, within a block of 16 tokens e^-450: neither fits a float.
    inputs, state = make(L=130, K=16, per_channel=True, g=0.0), torch.randn(1, 2, 16, 8)
    inputs["g"][..., ::3], inputs["g"][..., 1::3] = -30.0, -1e-3
    inputs["g"][:, ::7, :, 2::6] = -90.0
    assert_close(run(MIXER, inputs, None, state), exactly(MIXER, inputs, None, state))


@gates
def test_a_gate_that_closes_once_does_not_blur_the_tokens_around_it(kernels, per_channel):
    # Differences of sums from the chunk's start would keep 1e-3 of -1e4 only.
    inputs = make(L=128, per_channel=per_channel, g=-1e-3)
    inputs["g"][:, 5], inputs["g"][:, 70] = -1e4, -1e4
    results, exact = run(MIXER, inputs), exactly(MIXER, inputs)
    assert_close(results, exact)
    later = slice(71, 128)
    assert relative_error(results["dg"][:, later], exact["dg"][:, later]) < 1e-5


@gates
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_all_or_nothing_is_corrected(kernels, per_channel, beta):
    inputs, state = make(L=82, per_channel=per_channel), torch.randn(1, 2, 8, 8)
    inputs["beta"] = torch.full_like(inputs["beta"], beta)
    results = run(MIXER, inputs, None, state)
    assert_close(results, exactly(MIXER, inputs, None, state))
    assert results["dbeta"].abs().min() > 0


def test_beta_up_to_two_reflects(kernels):
    inputs = make(L=200)
    inputs["beta"] = inputs["beta"] * 2
    assert_close(run(MIXER, inputs), exactly(MIXER, inputs))


@gates
def test_gradients_of_gates_stay_exact_in_long_documents(kernels, per_channel):
    inputs = make(L=200 if kernels == "triton" else 1000, H=1, per_channel=per_channel, g=-1e-2)
    assert relative_error(run(MIXER, inputs)["dg"], exactly(MIXER, inputs)["dg"]) < 3e-6


@gates
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_stays_in_fp32_is_exact_to_16_bits_whatever_the_inputs(kernels, per_channel, dtype):
    if per_channel and dtype == torch.float16:
        skip_if_interpreted(kernels)
    inputs, state = make(L=130, H=1, K=16, V=24, per_channel=per_channel), torch.randn(1, 1, 16, 24)
    inputs |= {name: inputs[name].to(dtype) for name in "qkv"}
    given = {"dout": torch.randn(1, 130, 1, 24).to(dtype), "dfinal": torch.randn(1, 1, 16, 24)}
    results, exact = run(MIXER, inputs, None, state, **given), exactly(MIXER, inputs, None, state, **given)
    for name in ("final_state", "dinitial_state", "dg", "dbeta"):
        assert relative_error(results[name], exact[name]) < 2 * 2**-16, name


# ---- torch -----------------------------------------------------------------------------------------------------------


def test_flops_are_those_of_chunks_of_64():
    inputs = {name: x.requires_grad_() for name, x in make(L=10, H=4, G=2, K=5, V=3).items()}
    with FlopCounterMode(display=False) as counter:
        gated_delta_rule(**inputs).sum().backward()
    forward = 64 * 2 * (2 * 5 + 4 * 3) + 3 * 4 * 5 * 3
    backward = 64 * (2 * 2 * 5 + 4 * (5 * 3 + 4 * 5)) + 7 * 4 * 5 * 3
    assert counter.get_total_flops() == 2 * 10 * (forward + backward)


def test_arguments_that_do_not_fit_raise_with_the_name_and_the_shapes():
    inputs = make(B=2, L=5, H=4, G=2, K=6, V=3)
    wrong = {
        "q": (torch.randn(2, 5, 12), r"q must be \(B, L, heads, channels\), not \(2, 5, 12\)"),
        "k": (torch.randn(2, 5, 4, 6), r"k must have shape \(2, 5, 2, 6\), not \(2, 5, 4, 6\)"),
        "v": (torch.randn(2, 5, 3, 3), "q's 2 heads do not divide v's 3"),
        "g": (torch.randn(2, 5, 4, 3), r"g must have shape \(2, 5, 4, 6\), not \(2, 5, 4, 3\)"),
        "beta": (torch.randn(2, 5, 4, 1), r"beta must have shape \(2, 5, 4\), not \(2, 5, 4, 1\)"),
        "initial_state": (torch.randn(1, 4, 6, 3), r"initial_state must have shape \(2, 4, 6, 3\)"),
        "cu_seqlens": (offsets([5]), r"v must be one packed row"),
    }
    for name, (value, message) in wrong.items():
        with pytest.raises(ValueError, match=message):
            gated_delta_rule(**inputs | {name: value})
    with pytest.raises(ValueError, match=r"g must have shape \(2, 5, 4\), not \(4,\)"):
        gated_delta_rule(**inputs | {"g": torch.zeros(4)})
    with pytest.raises(TypeError, match="beta must be a floating-point tensor"):
        gated_delta_rule(**inputs | {"beta": torch.ones(2, 5, 4, dtype=torch.int64)})
