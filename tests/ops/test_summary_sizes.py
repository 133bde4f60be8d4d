"""Summaries of any size of heads, channels and states, and of decays."""

import pytest
import torch
from budget import skip_if_interpreted
from mixers import MIXERS
from selective_scan_data import make_inputs
from summaries import Recurrence, agree_with_fp64

HEADS = [(2, 1, 16, 16), (4, 2, 20, 37), (3, 3, 1, 70), (1, 1, 65, 1)]


@pytest.fixture(autouse=True)
def _interpreted_thoroughly(kernels):
    skip_if_interpreted(kernels)


@pytest.mark.parametrize(("H", "G", "K", "V"), HEADS)
@pytest.mark.parametrize("mixer", ["linear_attention", "gated_delta_rule", "gated_delta_rule_per_channel"])
def test_any_size_of_heads(mixer, H, G, K, V):
    recurrence = Recurrence(mixer.removesuffix("_per_channel"), MIXERS[mixer].make, {"scale": 0.3})
    agree_with_fp64(recurrence, MIXERS[mixer].make(1, 70, H=H, G=G, K=K, V=V), 4)


@pytest.mark.parametrize("mixer", ["gated_delta_rule", "gated_delta_rule_per_channel"])
def test_decays_that_let_nothing_through(mixer):
    tensors = MIXERS[mixer].make(1, 150)
    tensors["g"] = tensors["g"] - 2
    recurrence = Recurrence("gated_delta_rule", MIXERS[mixer].make, {"scale": 0.3})
    agree_with_fp64(recurrence, tensors, 4)
    assert not recurrence.summarize(tensors, 4)[0].any()


@pytest.mark.parametrize("mixer", ["gated_delta_rule", "gated_delta_rule_per_channel"])
def test_what_is_summarised_piece_by_piece_is_handed_on(mixer, kernels):
    if kernels == "triton":
        pytest.skip("slow to interpret, and in one piece")
    tensors = MIXERS[mixer].make(1, 1170)
    tensors |= {name: 1e-3 * tensors[name] for name in ("g", "beta")}  # so that the first token counts to the end
    recurrence = Recurrence("gated_delta_rule", MIXERS[mixer].make, {"scale": 0.3})
    agree_with_fp64(recurrence, tensors, 4)
    agree_with_fp64(recurrence, tensors, 1166)
    assert recurrence.summarize(tensors, 4)[0].norm() > 1


@pytest.mark.parametrize(("D", "N", "G"), [(1, 1, None), (16, 4, 1), (70, 17, 2), (200, 3, 4)])
def test_any_size_of_channels_and_states(D, N, G):
    recurrence = Recurrence("selective_scan", make_inputs, {"delta_softplus": True})
    agree_with_fp64(recurrence, make_inputs(1, 70, D, N, G), 4)


@pytest.mark.parametrize("trailing", [(), (1,), (33,), (70,), (3, 5), (0,), (4099,)])
def test_any_trailing_shape(trailing, kernels):
    if kernels == "triton" and trailing == (4099,):
        pytest.skip("slow to interpret")
    a, b = torch.rand(1, 19, *trailing), torch.randn(1, 19, *trailing)
    recurrence = Recurrence("linear_scan", lambda L: {"a": a, "b": b})
    if 0 not in trailing:
        agree_with_fp64(recurrence, {"a": a, "b": b}, 4)
    transition, state = recurrence.summarize({"a": a, "b": b}, 4)
    assert transition.shape == state.shape == recurrence.adjoin(b, {"a": a}, 4).shape == (1, *trailing)
