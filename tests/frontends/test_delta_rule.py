"""Each form of the gated delta rule gives what transformers' torch code gives, or goes to it."""

import pytest
import torch
from functions import GROUPS_HEADS, transformers_function
from torch.nn import functional as F

import packc.frontends

packc.frontends.install()

RULE = torch.ops.packc.gated_delta_rule.default
B, L, G, H, K, V = 2, 9, 2, 4, 4, 6

PER_HEAD = "qwen3_next", ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
PER_CHANNEL = "kimi_linear", ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention")
FUNCTIONS = [(family, name) for family, names in (PER_HEAD, PER_CHANNEL) for name in names]
each_function = pytest.mark.parametrize(("family", "name"), FUNCTIONS, ids=[name for _, name in FUNCTIONS])


def arguments(family, dtype=torch.float32):
    torch.manual_seed(0)
    groups = G if family == PER_HEAD[0] and GROUPS_HEADS else H
    gates = (B, L, H, K) if family == PER_CHANNEL[0] else (B, L, H)
    return {
        "query": torch.randn(B, L, groups, K, dtype=dtype),
        "key": F.normalize(torch.randn(B, L, groups, K), dim=-1).to(dtype),
        "value": torch.randn(B, L, H, V, dtype=dtype),
        "g": F.logsigmoid(torch.randn(gates) + 2),
        "beta": torch.rand(B, L, H, dtype=dtype),
        "initial_state": None,
        "output_final_state": False,
    }


def compiled(function, backend, **kwargs):
    return torch.compile(lambda: function(**kwargs), backend=backend, fullgraph=True)()


def assert_close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@each_function
@pytest.mark.parametrize("normalised", [True, False])
def test_the_function_is_the_op(family, name, normalised, packc_backend):
    given = arguments(family) | {"use_qk_l2norm_in_kernel": normalised}
    out, state = compiled(transformers_function(family, name), packc_backend, **given)
    expected, none = transformers_function(family, name)(**given)
    assert_close(out, expected)
    assert state is none is None
    assert packc_backend.calls(RULE) == 1


@each_function
def test_states_go_in_and_out(family, name, packc_backend):
    given = arguments(family) | {"initial_state": torch.randn(B, H, K, V), "output_final_state": True}
    out, state = compiled(transformers_function(family, name), packc_backend, **given)
    expected, expected_state = transformers_function(family, name)(**given)
    assert_close(out, expected)
    assert_close(state, expected_state)
    assert packc_backend.calls(RULE) == 1


@each_function
def test_the_result_has_the_dtype_of_the_queries_and_states_are_fp32(family, name, packc_backend):
    given = arguments(family, torch.bfloat16) | {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    out, state = compiled(transformers_function(family, name), packc_backend, **given)
    expected, expected_state = transformers_function(family, name)(**given)
    assert (out.dtype, state.dtype) == (expected.dtype, expected_state.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(out, expected, rtol=0.01, atol=0.01)
    assert packc_backend.calls(RULE) == 1


@each_function
def test_gradients(family, name, packc_backend):
    given = arguments(family) | {"use_qk_l2norm_in_kernel": True}
    leaves = {name: x.requires_grad_() for name, x in given.items() if isinstance(x, torch.Tensor)}
    function = transformers_function(family, name)
    gradients = []
    for call in (function, torch.compile(function, backend=packc_backend)):
        out, _ = call(**given)
        gradients.append(torch.autograd.grad(out.sin().sum(), list(leaves.values())))
    assert_close(gradients[1], gradients[0])


@pytest.mark.skipif(not GROUPS_HEADS, reason="before, these functions ignore boundaries")
@each_function
def test_boundaries_that_the_call_does_not_have_go_to_the_original(family, name, packc_backend):
    given, offsets = arguments(family), torch.tensor([0, 4, L], dtype=torch.int32)
    original = transformers_function(family, name)
    with pytest.raises(ValueError, match="can't keep packed sequences apart"):
        original(**given, cu_seqlens=offsets)

    def rule(offsets, **given):
        return original(**given, cu_seqlens=offsets)

    with pytest.raises(Exception, match="can't keep packed sequences apart"):
        compiled(rule, packc_backend, offsets=offsets, **given)
    assert packc_backend.calls(RULE) == 0
