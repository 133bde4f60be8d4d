"""The selective scan's values and gradients: each implementation against fp64, and against Mamba's own."""

import pytest
import torch
from selective_scan_data import (
    OPTIONAL,
    as_double,
    assert_all_close,
    make_inputs,
    offsets,
    relative_error,
    reproducible_like,
    scan_and_grads,
)

from packc import config
from packc.ops import cpu_library, selective_scan

needs_compiler = pytest.mark.skipif(not cpu_library.load("selective_scan"), reason="no C++ compiler")
KERNELS = ["reference", pytest.param("cpu", marks=needs_compiler)]


@pytest.fixture(params=KERNELS)
def kernels(request):
    with config.patch(kernels=request.param):
        yield request.param


# Whole and partial vectors of channels and tiles of states, chunks of 64 tokens and their edges.
@pytest.mark.parametrize(
    ("B", "L", "D", "N"),
    [(2, 65, 8, 4), (1, 64, 16, 16), (1, 129, 67, 3), (3, 7, 1, 1), (1, 1, 5, 6), (2, 33, 130, 17)],
)
def test_agrees_with_the_fp64_reference_for_any_size(kernels, B, L, D, N):
    inputs, state = make_inputs(B, L, D, N), torch.randn(B, D, N)
    exact = scan_and_grads(as_double(inputs), initial_state=state.double())
    assert_all_close(scan_and_grads(inputs, initial_state=state), exact)


@pytest.mark.parametrize("G", [1, 2, 3, 36])
def test_grouped_B_and_C(kernels, G):
    inputs = make_inputs(L=70, D=36, N=5, G=G)
    assert_all_close(scan_and_grads(inputs), scan_and_grads(as_double(inputs)))


def test_groups_repeat_consecutively(kernels):
    inputs = make_inputs(L=9, D=6, G=3)
    out = selective_scan(**inputs)
    for channel in range(6):
        alone = {name: x[..., channel : channel + 1] for name, x in inputs.items() if name not in "ABC"}
        own = {name: inputs[name][:, :, channel // 2] for name in "BC"}
        expected = selective_scan(**alone, **own, A=inputs["A"][channel : channel + 1])
        torch.testing.assert_close(out[..., channel : channel + 1], expected)


@pytest.mark.parametrize("absent", [("D",), ("z",), ("delta_bias",), OPTIONAL])
@pytest.mark.parametrize("delta_softplus", [True, False])
def test_optional_arguments(kernels, absent, delta_softplus):
    inputs = {name: x for name, x in make_inputs(L=70).items() if name not in absent}
    if not delta_softplus:
        inputs |= {name: x.abs() for name, x in inputs.items() if name.startswith("delta")}
    exact = scan_and_grads(as_double(inputs), delta_softplus=delta_softplus)
    assert_all_close(scan_and_grads(inputs, delta_softplus=delta_softplus), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_lose_no_more_than_a_plain_implementation(kernels, dtype):
    inputs = make_inputs(L=100, D=24, N=6)
    low = {name: x if name in ("A", "D", "delta_bias") else x.to(dtype) for name, x in inputs.items()}
    dout, dfinal = reproducible_like(low["u"]), torch.randn(1, 24, 6)
    exact = scan_and_grads(as_double(low), dout=dout.double(), dfinal=dfinal.double())
    # The plain implementation: fp32 inside, every input and result rounded once.
    rounded = {name: x.float() for name, x in exact.items()}
    results = scan_and_grads(low, dout=dout, dfinal=dfinal)
    for name, x in results.items():
        plain = relative_error(rounded[name].to(x.dtype), exact[name])
        assert relative_error(x, exact[name]) <= max(2 * plain, 1e-5), name
        if name.startswith("d"):
            assert x.dtype == low[name[1:]].dtype


def test_final_states_are_fp32_whatever_the_inputs(kernels):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        out, final = selective_scan(**make_inputs(dtype=dtype), output_final_state=True)
        assert (out.dtype, final.dtype) == (dtype, torch.float32)
    assert selective_scan(**make_inputs(dtype=torch.float64), output_final_state=True)[1].dtype == torch.float64


def test_gradcheck_with_documents_and_both_states():
    inputs = make_inputs(L=7, D=4, N=2, G=2, dtype=torch.float64)
    state = torch.randn(4, 4, 2, dtype=torch.float64)

    def scan(state, *values):
        return selective_scan(
            **dict(zip(inputs, values, strict=True)),
            delta_softplus=True,
            cu_seqlens=offsets([3, 0, 1, 3]),
            initial_state=state,
            output_final_state=True,
        )

    assert torch.autograd.gradcheck(scan, [x.requires_grad_() for x in (state, *inputs.values())])


def test_the_final_state_alone_has_gradients(kernels):
    inputs, state = make_inputs(L=70), torch.randn(1, 12, 5)
    exact = scan_and_grads(as_double(inputs), initial_state=state.double(), dout=torch.zeros(1, 70, 12).double())
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    _, final = selective_scan(
        **leaves, delta_softplus=True, initial_state=state.requires_grad_(), output_final_state=True
    )
    wanted = ("u", "delta", "A", "B", "delta_bias")
    grads = torch.autograd.grad(final, [leaves[name] for name in wanted] + [state], reproducible_like(final))
    results = {f"d{name}": grad for name, grad in zip((*wanted, "initial_state"), grads, strict=True)}
    assert_all_close(results, exact)


def as_a_model_hands_over(name, x):
    """u, z: halves of a projection; delta: channel-first memory; B, C: slices, transposed twice."""
    if name == "delta":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if name in ("u", "z", "B", "C"):
        return torch.cat([torch.full_like(x, torch.nan), x], -1)[..., x.shape[-1] :]
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("view", [as_a_model_hands_over, lambda name, x: x.repeat_interleave(2, -1)[..., ::2]])
def test_strided_inputs_equal_contiguous_ones(kernels, dtype, view):
    inputs = make_inputs(B=2, L=83, D=21, N=6, dtype=dtype)
    strided = {name: view(name, x) for name, x in inputs.items()}
    dout = reproducible_like(inputs["u"])
    expected = scan_and_grads(inputs, dout=dout)
    results = scan_and_grads(strided, dout=dout.transpose(0, 1).contiguous().transpose(0, 1))
    # The reference's sums may be taken in another order.
    assert_all_close(results, expected, 0 if kernels == "cpu" else 1e-5)


def test_softplus_in_its_tails(kernels):
    delta = torch.tensor([-1e4, -100, -80, -30, -16, -5, -1e-4, 0, 1e-4, 5, 16, 19.9, 20.1, 30, 80, 100, 1e4])[:, None]
    inputs = {
        "u": torch.ones(1, 17, 1),
        "delta": delta[None],
        "A": torch.zeros(1, 1),
        "B": torch.ones(1, 17, 1),
        "C": torch.ones(1, 17, 1),
    }
    # One document a token: out is softplus(delta), and ddelta its slope.
    documents = torch.arange(18)
    results = scan_and_grads(inputs, documents, dout=torch.ones(1, 17, 1))
    exact = scan_and_grads(as_double(inputs), documents, dout=torch.ones(1, 17, 1).double())
    for name in ("out", "ddelta"):
        torch.testing.assert_close(results[name].double(), exact[name], rtol=2e-6, atol=1e-30)


def test_decays_from_none_to_complete(kernels):
    rates = torch.tensor([0, -1e-7, -1e-3, -1, -30, -86, -88, -1e3, -1e30])[:, None]
    inputs = {
        "u": torch.randn(1, 70, 9),
        "delta": torch.ones(1, 70, 9),
        "A": rates,
        "B": torch.randn(1, 70, 1),
        "C": torch.randn(1, 70, 1),
    }
    results = scan_and_grads(inputs, delta_softplus=False)
    exact = scan_and_grads(as_double(inputs), delta_softplus=False)
    for channel in range(9):
        assert relative_error(results["out"][..., channel], exact["out"][..., channel]) < 1e-5, rates[channel]


def test_a_nan_in_any_input_shows_in_the_output(kernels):
    for name in make_inputs():
        inputs = make_inputs()
        inputs[name].flatten()[0] = torch.nan
        assert selective_scan(**inputs, delta_softplus=True)[0, :, 0].isnan().any(), name


@needs_compiler
def test_runs_are_bitwise_reproducible_for_any_number_of_threads():
    inputs = make_inputs(B=2, L=200, D=130, N=5)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append(scan_and_grads(inputs))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, x in other.items():
            assert torch.equal(x, results[0][name]), name


@needs_compiler
def test_memory_beyond_inputs_and_outputs_and_no_copies_of_strided_inputs():
    T, D, N = 1024, 192, 16
    inputs = {name: as_a_model_hands_over(name, x) for name, x in make_inputs(L=T, D=D, N=N).items()}
    arguments = (*inputs.values(), True, None, None)
    with torch.profiler.profile(profile_memory=True) as record:
        out, _, chunk_states = torch.ops.packc.selective_scan.default(*arguments, False)
        grads = torch.ops.packc.selective_scan_bwd.default(out, None, chunk_states, *arguments, True)
    events = record.profiler.kineto_results.events()
    allocated = sum(max(event.nbytes(), 0) for event in events if event.name() == "[memory]")
    extra = allocated - sum(x.numel() * x.element_size() for x in (out, *grads))
    assert 0 < extra <= T * D * N * 4 / 8


def test_equals_the_function_of_transformers():
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    inputs = make_inputs(B=2, L=40, D=10, N=4)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    first = {name: leaves[name].transpose(1, 2) for name in ("u", "delta", "B", "C", "z")}
    out, final = mamba_selective_scan(
        first["u"],
        first["delta"],
        leaves["A"],
        first["B"],
        first["C"],
        D=leaves["D"],
        z=first["z"],
        delta_bias=leaves["delta_bias"],
        delta_softplus=True,
        return_last_state=True,
    )
    grads = torch.autograd.grad(
        [out, final], list(leaves.values()), [reproducible_like(out.mT.contiguous()).mT, reproducible_like(final)]
    )
    theirs = {"out": out.transpose(1, 2), "final_state": final}
    theirs |= {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    assert_all_close(scan_and_grads(inputs), theirs)


@pytest.mark.parametrize("name", ["delta", "A", "B", "C", "D", "z", "delta_bias"])
def test_shapes_that_do_not_fit_raise_with_the_name(kernels, name):
    inputs = make_inputs(N=5)
    inputs[name] = inputs[name][..., :-1] if name != "A" else inputs[name][:-1]
    with pytest.raises(ValueError, match=rf"selective_scan: {name} must .*{inputs[name].shape[-1]}"):
        selective_scan(**inputs)


def test_other_bad_arguments_raise():
    inputs = make_inputs()
    with pytest.raises(TypeError, match=r"A must be a floating-point tensor, not torch\.complex64"):
        selective_scan(**inputs | {"A": inputs["A"].to(torch.complex64)})
    with pytest.raises(TypeError, match=r"u must be a floating-point tensor, not torch\.int64"):
        selective_scan(**inputs | {"u": inputs["u"].long()})
    with pytest.raises(ValueError, match=r"u must be \(B, L, D\), not \(20, 12\)"):
        selective_scan(**inputs | {"u": inputs["u"][0]})
    with pytest.raises(ValueError, match="G = 5 groups do not divide u's D = 12"):
        selective_scan(**make_inputs(G=5))
    with pytest.raises(ValueError, match="B and C must both be"):
        selective_scan(**inputs | {"B": inputs["B"][:, :, None]})
    with pytest.raises(ValueError, match=r"initial_state must have shape \(1, 12, 5\), not \(2, 12, 5\)"):
        selective_scan(**inputs, initial_state=torch.zeros(2, 12, 5))
    with pytest.raises(TypeError, match="cu_seqlens must be int32 or int64"):
        selective_scan(**inputs, cu_seqlens=torch.tensor([0.0, 20.0]))
    with pytest.raises(ValueError, match="one packed row"):
        selective_scan(**make_inputs(B=2), cu_seqlens=offsets([20]))


@pytest.mark.parametrize("lengths", [[19], [21], [25, -5], []])
def test_offsets_that_do_not_cover_the_tokens_raise(kernels, lengths):
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to L = 20"):
        selective_scan(**make_inputs(L=20), cu_seqlens=offsets(lengths))
