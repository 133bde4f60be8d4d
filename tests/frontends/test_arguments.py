"""Each argument of the kept functions gives what the original gives, or goes to the original."""

import pytest
import torch
from transformers.models.mamba import modeling_mamba as modeling

import packc.frontends
from packc.passes import argument_path

packc.frontends.install()

CONV, SCAN = torch.ops.packc.causal_conv1d.default, torch.ops.packc.selective_scan.default
B, D, L, N, W = 2, 6, 9, 4, 4


def conv_arguments(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(B, D, L, dtype=dtype), torch.randn(D, W, dtype=dtype), torch.randn(D, dtype=dtype)


def scan_arguments(dtype=torch.float32):
    """Named as the original names them; only A, D and delta_bias stay fp32 in a bf16 model."""
    torch.manual_seed(0)
    return {
        "hidden_states": torch.randn(B, D, L, dtype=dtype),
        "dt": torch.randn(B, D, L, dtype=dtype),
        "A": -torch.rand(D, N) - 0.1,
        "B": torch.randn(B, N, L, dtype=dtype),
        "C": torch.randn(B, N, L, dtype=dtype),
        "D": torch.randn(D),
        "z": torch.randn(B, D, L, dtype=dtype),
        "delta_bias": torch.randn(D),
        "delta_softplus": True,
    }


def compiled(function, backend, *args, **kwargs):
    # A frame of its own for each call, so that no test meets another's cache entries.
    return torch.compile(lambda: function(*args, **kwargs), backend=backend, fullgraph=True)()


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", [None, "silu", "swish"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_conv(activation, with_bias, packc_backend):
    x, weight, bias = conv_arguments()
    args = (x, weight, bias if with_bias else None, activation)
    actual = compiled(modeling.causal_conv1d_fn, packc_backend, *args)
    if activation == "swish":  # a name that only the kernels know
        args = (*args[:3], "silu")
    assert_close(actual, modeling.causal_conv1d_fn(*args))
    assert packc_backend.calls(CONV) == 1


def test_conv_ignores_packing_arguments_that_are_none(packc_backend):
    compiled(modeling.causal_conv1d_fn, packc_backend, *conv_arguments(), seq_idx=None, cu_seqlens=None)
    assert packc_backend.calls(CONV) == 1


def test_conv_of_an_activation_that_packc_does_not_know_is_the_original(packc_backend):
    arguments = (*conv_arguments(), "gelu")
    actual = compiled(modeling.causal_conv1d_fn, packc_backend, *arguments)
    assert_close(actual, modeling.causal_conv1d_fn(*arguments))
    assert packc_backend.calls(CONV) == 0


def test_conv_takes_no_notice_of_what_else_a_model_was_called_with(packc_backend):
    arguments = {"output_router_logits": True, "logits_to_keep": 1}
    actual = compiled(modeling.causal_conv1d_fn, packc_backend, *conv_arguments(), **arguments)
    assert_close(actual, modeling.causal_conv1d_fn(*conv_arguments(), **arguments))
    assert packc_backend.calls(CONV) == 1


@pytest.mark.parametrize("name", ["seq_idx", "cu_seqlens"])
def test_packing_arguments_that_the_call_does_not_have_go_to_the_original(name, packc_backend):
    def conv(*arguments, rows):
        return modeling.causal_conv1d_fn(*arguments, **{name: rows})

    arguments, rows = conv_arguments(), torch.zeros(B, L, dtype=torch.int32)
    try:
        expected = conv(*arguments, rows=rows)
    except ValueError:
        with pytest.raises(Exception, match="can't keep packed sequences apart"):
            compiled(conv, packc_backend, *arguments, rows=rows)
    else:  # transformers 5.15 drops them
        assert_close(compiled(conv, packc_backend, *arguments, rows=rows), expected)
        assert packc_backend.calls(CONV) == 0


@pytest.mark.parametrize("name", ["seq_idx", "cu_seqlens"])
def test_packing_arguments_of_the_call_are_inputs_of_the_graph(name, packc_backend):
    rows = torch.zeros(B, L, dtype=torch.int32)
    compiled(modeling.causal_conv1d_fn, packc_backend, *conv_arguments(), **{name: rows})
    assert packc_backend.calls(CONV) == 1
    (graph,) = packc_backend.graphs
    assert name in [argument_path(node) for node in graph.find_nodes(op="placeholder")]


@pytest.mark.parametrize("absent", [(), ("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias")], ids=str)
@pytest.mark.parametrize("softplus", [True, False])
def test_scan(absent, softplus, packc_backend):
    arguments = {**scan_arguments(), "delta_softplus": softplus}
    if not softplus:
        arguments["dt"] = arguments["dt"].abs()
        arguments["delta_bias"] = arguments["delta_bias"].abs()
    for name in absent:
        del arguments[name]
    actual = compiled(modeling.mamba_selective_scan, packc_backend, **arguments)
    assert_close(actual, modeling.mamba_selective_scan(**arguments))
    assert packc_backend.calls(SCAN) == 1


@pytest.mark.parametrize("which", ["use_mambapy", "use_associative_scan"])
def test_every_way_to_scan_is_the_same_scan(which, packc_backend):
    arguments = {**scan_arguments(), which: True}
    actual = compiled(modeling.mamba_selective_scan, packc_backend, **arguments)
    assert_close(actual, modeling.mamba_selective_scan(**arguments))
    assert packc_backend.calls(SCAN) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_last_state_has_the_shape_and_dtype_of_the_original(dtype, packc_backend):
    arguments = {**scan_arguments(dtype), "return_last_state": True}
    if dtype == torch.float64:
        arguments.update({name: arguments[name].double() for name in ("A", "D", "delta_bias")})
    _, state = compiled(modeling.mamba_selective_scan, packc_backend, **arguments)
    _, expected = modeling.mamba_selective_scan(**arguments)
    assert (state.shape, state.dtype) == (expected.shape, expected.dtype)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(state, expected, rtol=tolerance, atol=tolerance)
    assert packc_backend.calls(SCAN) == 1


def test_the_scan_returns_the_dtype_of_its_input_as_the_kernel_does(packc_backend):
    arguments = scan_arguments(torch.bfloat16)
    actual = compiled(modeling.mamba_selective_scan, packc_backend, **arguments)
    expected = modeling.mamba_selective_scan(**arguments)
    assert expected.dtype == torch.float32  # promoted by D; each model casts it back
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, rtol=0.05, atol=0.05)


def test_a_conv_of_mixed_dtypes_returns_the_dtype_of_its_input(packc_backend):
    x, weight, bias = conv_arguments()
    actual = compiled(modeling.causal_conv1d_fn, packc_backend, x.bfloat16(), weight, bias, "silu")
    expected = modeling.causal_conv1d_fn(x.bfloat16(), weight, bias, "silu")
    assert actual.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected)


def test_scan_that_packc_does_not_know_is_the_original(packc_backend):
    arguments = {**scan_arguments(), "of_a_later_version": 1}
    actual = compiled(modeling.mamba_selective_scan, packc_backend, **arguments)
    assert_close(actual, modeling.mamba_selective_scan(**arguments))
    assert packc_backend.calls(SCAN) == 0


def test_gradients(packc_backend):
    arguments = scan_arguments()
    leaves = {name: value.requires_grad_() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    gradients = []
    for call in (modeling.mamba_selective_scan, torch.compile(modeling.mamba_selective_scan, backend=packc_backend)):
        out, state = call(**arguments, return_last_state=True)
        gradients.append(torch.autograd.grad(out.sin().sum() + state.sin().sum(), list(leaves.values())))
    assert_close(gradients[1], gradients[0])
