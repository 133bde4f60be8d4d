"""The scan's Triton kernels: interpreted on tiny inputs, or on a GPU. A document here may cross tiles and segments."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from implementations import implementation, opcheck
from selective_scan_data import (
    OPTIONAL,
    as_double,
    assert_all_close,
    make_inputs,
    offsets,
    relative_error,
    scan_and_grads,
    tokens,
)

from packc import config
from packc.ops import selective_scan
from packc.ops.selective_scan import triton_backward, triton_forward
from packc.ops.tritonsrc.tokens import wide

PER_TOKEN = ("out", "du", "ddelta", "dB", "dC", "dz")


@pytest.fixture(params=["triton", pytest.param("gpu", marks=pytest.mark.gpu)], autouse=True)
def kernels(request):
    with implementation(request.param):
        yield request.param


few = settings(
    max_examples=4, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def reference(inputs, cu_seqlens=None, state=None, **options):
    with config.patch(kernels="reference"):
        return scan_and_grads(as_double(inputs), cu_seqlens, None if state is None else state.double(), **options)


# ---- values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("B", "L", "D", "N", "G"), [(2, 7, 3, 2, None), (1, 9, 6, 2, 3), (1, 5, 130, 1, None)])
def test_agrees_with_the_fp64_reference(B, L, D, N, G):
    inputs, state = make_inputs(B, L, D, N, G), torch.randn(B, D, N)
    assert_all_close(scan_and_grads(inputs, initial_state=state), reference(inputs, state=state))


@pytest.mark.parametrize(
    "lengths", [[3, 61, 6], *(pytest.param(each, marks=pytest.mark.slow) for each in ([70], [64, 6]))]
)
def test_a_row_in_segments_agrees_with_the_fp64_reference(lengths):
    inputs, state = make_inputs(L=70, D=2, N=1), torch.randn(len(lengths), 2, 1)
    assert triton_forward.segment_tokens(1, 70, 1, 64, inputs["u"].device) == 64
    results = scan_and_grads(inputs, offsets(lengths), state)
    assert_all_close(results, reference(inputs, offsets(lengths), state))


@pytest.mark.slow
def test_the_number_of_segments_does_not_matter(monkeypatch):
    inputs, documents = make_inputs(L=70, D=2, N=1), offsets([66, 4])
    in_segments = scan_and_grads(inputs, documents)
    assert triton_forward.segment_tokens(1, 70, 1, 64, inputs["u"].device) == 64
    monkeypatch.setattr(triton_forward, "segment_tokens", lambda *_: 128)
    assert_all_close(scan_and_grads(inputs, documents), in_segments, 1e-6)


def test_rows_in_segments_agree_with_the_fp64_reference():
    inputs, state = make_inputs(B=2, L=66, D=2, N=1), torch.randn(2, 2, 1)
    assert_all_close(scan_and_grads(inputs, initial_state=state), reference(inputs, state=state))


def test_states_of_which_there_are_more_than_registers_go_by_groups(monkeypatch):
    inputs, state, documents = make_inputs(L=70, D=2, N=3), torch.randn(3, 2, 3), offsets([3, 61, 6])
    together = scan_and_grads(inputs, documents, state)
    monkeypatch.setattr(triton_forward, "GROUP", 2)
    assert not triton_forward.resident(3)["RESIDENT"]
    assert_all_close(scan_and_grads(inputs, documents, state), together, 1e-6)


@pytest.mark.parametrize("absent", [("D",), ("z",), ("delta_bias",), OPTIONAL])
@pytest.mark.parametrize("delta_softplus", [True, False])
def test_optional_arguments(absent, delta_softplus):
    inputs = {name: x for name, x in make_inputs(L=6, D=3, N=2).items() if name not in absent}
    if not delta_softplus:
        inputs["delta"] = inputs["delta"].abs()
    results = scan_and_grads(inputs, delta_softplus=delta_softplus)
    assert_all_close(results, reference(inputs, delta_softplus=delta_softplus))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_lose_no_more_than_the_reference(dtype):
    inputs = make_inputs(L=9, D=5, N=2, dtype=dtype)
    with config.patch(kernels="reference"):
        plain = scan_and_grads(inputs)
    exact, results = reference(inputs), scan_and_grads(inputs)
    for name, x in results.items():
        assert x.dtype == plain[name].dtype, name
        # fp32 inside, an ulp a token, and one rounding at the end, as the reference; interpreted, bf16 is truncated.
        ulps = max(torch.finfo(x.dtype).eps / 2, 9 * torch.finfo(torch.float32).eps)
        assert relative_error(x, exact[name]) <= 2 * relative_error(plain[name], exact[name]) + ulps, name


def test_softplus_in_its_tails():
    delta = torch.tensor([-1e4, -100, -80, -30, -16, -5, -1e-4, 0, 1e-4, 5, 16, 19.9, 20.1, 30, 80, 100, 1e4])[:, None]
    inputs = {"u": torch.ones(1, 17, 1), "delta": delta[None], "A": torch.zeros(1, 1)}
    inputs |= {"B": torch.ones(1, 17, 1), "C": torch.ones(1, 17, 1)}
    # One document a token: out is softplus(delta), and ddelta its slope.
    documents, dout = torch.arange(18), torch.ones(1, 17, 1)
    results, exact = scan_and_grads(inputs, documents, dout=dout), reference(inputs, documents, dout=dout.double())
    for name in ("out", "ddelta"):
        torch.testing.assert_close(results[name].double(), exact[name], rtol=2e-6, atol=1e-30)


def test_strided_inputs_equal_contiguous_ones():
    inputs = make_inputs(L=6, D=3, N=2)
    strided = {name: x.repeat_interleave(2, -1)[..., ::2] for name, x in inputs.items()}
    strided["delta"] = inputs["delta"].transpose(1, 2).contiguous().transpose(1, 2)
    assert_all_close(scan_and_grads(strided), scan_and_grads(inputs), 0)


def test_wide_channel_strides_count_in_64_bits(monkeypatch):
    inputs = make_inputs(L=5, D=3, N=1)
    expected = scan_and_grads(inputs)
    for module in (triton_backward, triton_forward):
        monkeypatch.setattr(module, "wide", lambda *_: True)
    assert_all_close(scan_and_grads(inputs), expected, 0)


@pytest.mark.parametrize(("tokens", "channels"), [((2**16, 2**15), 1), ((1, 2), 2**31)])
def test_what_32_bits_do_not_count_is_wide(tokens, channels):
    assert wide(torch.empty((*tokens, channels), dtype=torch.bool, device="meta"))
    assert not wide(torch.empty((tokens[0], tokens[1] - 1, channels - 1), dtype=torch.bool, device="meta"))


def test_the_backward_is_deterministic():
    inputs, documents = make_inputs(L=8, D=3, N=2), offsets([3, 5])
    assert_all_close(scan_and_grads(inputs, documents), scan_and_grads(inputs, documents), 0)


# ---- documents -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@few
@given(lengths=st.lists(st.sampled_from([0, 1, 2, 5]), min_size=1, max_size=4))
def test_packed_equals_each_document_alone(lengths):
    L = sum(lengths)
    torch.manual_seed(L)
    inputs, state = make_inputs(L=L, D=2, N=2), torch.randn(len(lengths), 2, 2)
    dout, dfinal = torch.randn(1, L, 2), torch.randn(len(lengths), 2, 2)
    packed = scan_and_grads(inputs, offsets(lengths), state, dout=dout, dfinal=dfinal)
    parts, begin = [], 0
    for n, length in enumerate(lengths):
        span = slice(begin, begin := begin + length)
        part = scan_and_grads(
            tokens(inputs, span), None, state[n : n + 1], dout=dout[:, span], dfinal=dfinal[n : n + 1]
        )
        parts.append(part)
    alone = {name: torch.cat([part[name] for part in parts], 1) for name in PER_TOKEN}
    alone |= {name: torch.cat([part[name] for part in parts]) for name in ("final_state", "dinitial_state")}
    alone |= {name: sum(part[name] for part in parts) for name in ("dA", "dD", "ddelta_bias")}
    assert_all_close(packed, alone)


@few
@given(first=st.sampled_from([0, 1, 4, 7]), second=st.sampled_from([1, 5]))
def test_a_document_cut_anywhere_goes_on_from_its_state(first, second):
    L = first + second
    inputs, state = make_inputs(L=L, D=2, N=1), torch.randn(1, 2, 1)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    options = {"delta_softplus": True, "output_final_state": True}
    whole = selective_scan(**leaves, initial_state=state, **options)
    head, carried = selective_scan(**tokens(leaves, slice(0, first)), initial_state=state, **options)
    tail, final = selective_scan(**tokens(leaves, slice(first, L)), initial_state=carried, **options)
    cut = torch.cat([head, tail], 1), final
    assert_all_close(dict(enumerate(cut)), dict(enumerate(whole)), 1e-6)
    weights = [torch.randn_like(x) for x in whole]
    expected = torch.autograd.grad(whole, list(leaves.values()), weights)
    results = torch.autograd.grad(cut, list(leaves.values()), weights)
    assert_all_close(dict(zip(leaves, results, strict=True)), dict(zip(leaves, expected, strict=True)))


def test_permuting_documents_permutes_the_results():
    spans, order = [slice(0, 2), slice(2, 3), slice(3, 8)], [2, 0, 1]
    inputs, dout, dfinal = make_inputs(L=8, D=2, N=2), torch.randn(1, 8, 2), torch.randn(3, 2, 2)
    index = torch.cat([torch.arange(*spans[n].indices(8)) for n in order])
    moved = {name: x[:, index] if x.ndim == 3 else x for name, x in inputs.items()}
    results = scan_and_grads(inputs, offsets([2, 1, 5]), dout=dout, dfinal=dfinal)
    permuted = scan_and_grads(moved, offsets([5, 2, 1]), dout=dout[:, index], dfinal=dfinal[order])
    assert_all_close(
        {name: permuted[name] for name in PER_TOKEN}, {name: results[name][:, index] for name in PER_TOKEN}
    )
    assert_all_close({"final": permuted["final_state"]}, {"final": results["final_state"][order]})


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["u", "delta", "B", "C", "z", "initial_state"])
def test_nothing_in_one_document_changes_another_by_one_bit(name, poison):
    inputs, state = make_inputs(L=9, D=2, N=1), torch.randn(4, 2, 1)
    bad, bad_state = {key: x.clone() for key, x in inputs.items()}, state.clone()
    if name == "initial_state":
        bad_state[1] = poison
    else:
        bad[name][:, 3:7] = poison
    documents, others = offsets([3, 4, 0, 2]), [0, 1, 2, 7, 8]
    clean, results = scan_and_grads(inputs, documents, state), scan_and_grads(bad, documents, bad_state)
    for key in PER_TOKEN:
        assert torch.equal(results[key][:, others], clean[key][:, others]), key
    for key in ("final_state", "dinitial_state"):
        assert torch.equal(results[key][[0, 2, 3]], clean[key][[0, 2, 3]]), key
    assert not torch.equal(results["out"], clean["out"])


def test_nan_does_not_cross_from_segment_to_segment():
    inputs = make_inputs(L=68, D=1, N=1)
    bad = {key: x.clone() for key, x in inputs.items()}
    bad["u"][:, 62:66] = torch.nan
    documents, others = offsets([62, 4, 2]), [*range(62), 66, 67]
    clean, results = scan_and_grads(inputs, documents), scan_and_grads(bad, documents)
    for key in PER_TOKEN:
        assert torch.equal(results[key][:, others], clean[key][:, others]), key


def test_tokens_in_front_of_a_view_and_behind_it_are_not_read():
    inputs, documents = make_inputs(L=6, D=3, N=2), offsets([2, 4])
    surrounded = {
        name: torch.nn.functional.pad(x, (0, 0, 3, 3), value=torch.nan)[:, 3:-3] if x.ndim == 3 else x
        for name, x in inputs.items()
    }
    assert_all_close(scan_and_grads(surrounded, documents), scan_and_grads(inputs, documents), 0)


@pytest.mark.parametrize(
    "lengths", [[64, 64, 64], *(pytest.param(lengths, marks=pytest.mark.slow) for lengths in ([128, 64], [64, 128]))]
)
def test_documents_that_end_where_segments_do_get_no_gradient_from_the_next(lengths):
    inputs = make_inputs(L=192, D=1, N=1) | {"A": torch.tensor([[-1e-3]])}  # states last through whole segments
    others = slice(0, 192 - lengths[-1])
    dout, dfinal = torch.randn(1, 192, 1), torch.zeros(len(lengths), 1, 1)
    dout[:, others] = 0
    results = scan_and_grads(inputs, offsets(lengths), dout=dout, dfinal=dfinal)
    for name in ("du", "ddelta", "dB"):
        assert not results[name][:, others].any(), name
        assert results[name][:, others.stop :].any(), name


@pytest.mark.parametrize("lengths", [[0, 0], [0]])
def test_no_tokens_at_all(lengths):
    inputs, state = make_inputs(L=0, D=2, N=2), torch.randn(len(lengths), 2, 2)
    results = scan_and_grads(inputs, offsets(lengths), state)
    assert torch.equal(results["final_state"], state)
    assert torch.equal(results["dinitial_state"], scan_and_grads(inputs, offsets(lengths), state)["dinitial_state"])
    assert not results["dA"].any()


# ---- the op ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
def test_opcheck(packed):
    inputs = make_inputs(L=6, D=2, N=1)
    state = torch.randn(2 if packed else 1, 2, 1)
    leaves = [x.requires_grad_() for x in (*inputs.values(), state)]
    arguments = (*leaves[:-1], True, offsets([2, 4]) if packed else None, leaves[-1], True)
    opcheck("triton", torch.ops.packc.selective_scan.default, arguments)
    out, final, chunks = torch.ops.packc.selective_scan.default(*[_detached(x) for x in arguments])
    backward = (torch.randn_like(out), torch.randn_like(final), chunks, *[_detached(x) for x in arguments[:-1]], True)
    opcheck("triton", torch.ops.packc.selective_scan_bwd.default, backward)


def _detached(x):
    return x.detach() if isinstance(x, torch.Tensor) else x


@pytest.mark.gpu
def test_offsets_past_two_to_the_31_elements(kernels):
    if kernels != "gpu":
        pytest.skip("needs 40 GiB, on a GPU")
    T, D = 2**20 + 5, 2**11 + 64  # T * D > 2**31
    inputs, tail = make_inputs(L=3, D=D, N=1, dtype=torch.bfloat16), slice(T - 3, T)
    long = dict(inputs)
    for name in ("u", "delta", "B", "C", "z"):
        long[name] = torch.zeros(1, T, inputs[name].shape[-1], dtype=torch.bfloat16)
        long[name][:, tail] = inputs[name]
    out = selective_scan(**long, delta_softplus=True, cu_seqlens=offsets([T - 3, 3]))
    assert torch.equal(out[:, tail], selective_scan(**inputs, delta_softplus=True))
