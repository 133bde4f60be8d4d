"""SSD beyond what all mixers promise: what its arguments mean."""

import pytest
import torch
from mixers import MIXERS, assert_close, exactly, run
from selective_scan_data import offsets, reproducible_like
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from packc.ops import linear_attention, ssd

MIXER = MIXERS["ssd"]
ARGUMENTS = ("x", "dt", "A", "B", "C", "D", "z")
OPTIONAL = ("D", "z", "dt_bias")


def make(L=66, H=4, G=2, P=3, N=5):
    return {
        "x": torch.randn(1, L, H, P),
        "dt": torch.randn(1, L, H),
        "A": -torch.rand(H) - 0.1,
        "B": torch.randn(1, L, G, N),
        "C": torch.randn(1, L, G, N),
        "D": torch.randn(H),
        "z": torch.randn(1, L, H, P),
        "dt_bias": torch.randn(H) - 1,
    }


@pytest.mark.parametrize("dt_limit", [(0.0, float("inf")), (0.1, 0.9)])
def test_equals_the_function_of_transformers(kernels, dt_limit):
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    inputs, state = make(L=70), torch.randn(1, 4, 3, 5)
    del inputs["z"]
    leaves = {name: x.requires_grad_() for name, x in (inputs | {"initial_states": state}).items()}
    options = {"dt_softplus": True, "dt_limit": dt_limit}
    named = {name: x for name, x in leaves.items() if name != "x"}
    theirs = mamba2_chunk_scan(leaves["x"], **named, chunk_size=32, return_final_states=True, **options)
    gradients = [reproducible_like(x) for x in theirs]
    grads = torch.autograd.grad(theirs, list(leaves.values()), gradients)
    leaves["initial_state"] = leaves.pop("initial_states")
    ours = ssd(**leaves, output_final_state=True, **options)
    own = torch.autograd.grad(ours, list(leaves.values()), gradients)
    assert_close(dict(enumerate([*ours, *own])), dict(enumerate([*theirs, *grads])))


@pytest.mark.parametrize("packed", [True, False])
def test_is_linear_attention_bit_for_bit(kernels, packed):
    inputs, documents = make(L=70), offsets([3, 67]) if packed else None
    x, dt, A, B, C = (inputs[name] for name in ("x", "dt", "A", "B", "C"))
    dt = dt.exp()
    out, state = ssd(x, dt, A, B, C, cu_seqlens=documents, output_final_state=True)
    same, transposed = linear_attention(
        C, B, x * dt[..., None], dt * A, 1.0, cu_seqlens=documents, output_final_state=True
    )
    if kernels == "reference":
        assert_close({"out": out, "state": state}, {"out": same, "state": transposed.mT}, 1e-6)
    else:
        assert torch.equal(out, same)
        assert torch.equal(state, transposed.mT)


@pytest.mark.parametrize("absent", [("D",), ("z",), ("dt_bias",), OPTIONAL])
@pytest.mark.parametrize("dt_softplus", [True, False])
def test_optional_arguments(kernels, absent, dt_softplus):
    inputs = {name: x for name, x in make(L=9).items() if name not in absent}
    mixer = MIXER._replace(options={"dt_softplus": dt_softplus})
    assert_close(run(mixer, inputs), exactly(mixer, inputs))


def test_one_group_needs_no_axis(kernels):
    inputs = make(L=9, G=1)
    flat = inputs | {name: inputs[name][:, :, 0] for name in "BC"}
    assert torch.equal(ssd(**inputs), ssd(**flat))


def test_the_skip_connection_may_be_per_channel(kernels):
    inputs = make(L=9)
    per_channel = inputs | {"D": torch.randn(4, 3)}
    assert_close(run(MIXER, per_channel), exactly(MIXER, per_channel))
    repeated = inputs | {"D": inputs["D"][:, None].expand(4, 3)}
    assert torch.equal(ssd(**inputs), ssd(**repeated))


def test_step_sizes_stay_within_their_limits(kernels):
    inputs = make(L=9)
    outside = inputs | {"dt": torch.full_like(inputs["dt"], 50.0), "dt_bias": torch.zeros(4)}
    within = outside | {"dt": torch.full_like(inputs["dt"], 0.5)}
    torch.testing.assert_close(ssd(**outside, dt_softplus=True, dt_limit=(0.0, 0.5)), ssd(**within))
    outside["dt"] = outside["dt"].requires_grad_()
    ssd(**outside, dt_softplus=True, dt_limit=(0.0, 0.5)).sum().backward()
    assert not outside["dt"].grad.any()


@pytest.mark.parametrize("name", ["x", "dt", "A", "B", "D", "z"])
def test_one_fp64_argument_makes_fp64_states(name):
    inputs = make(L=3) | {name: make(L=3)[name].double()}
    state = ssd(**inputs, output_final_state=True)[1]
    assert state.dtype == torch.float64
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert ssd(**inputs, output_final_state=True)[1].dtype == torch.float64


def test_flops_are_linear_attentions():
    inputs = {name: x.requires_grad_() for name, x in make(L=10).items()}
    with FlopCounterMode(display=False) as counter:
        ssd(**inputs).sum().backward()
    forward = 64 * (2 * 5 + 4 * 3) + 2 * 4 * 5 * 3
    backward = 64 * (2 * 5 + 4 * (2 * 3 + 2 * 5)) + 4 * 4 * 5 * 3
    assert counter.get_total_flops() == 2 * 10 * (forward + backward)


@pytest.mark.parametrize("name", ["dt", "A", "B", "C", "D", "z", "dt_bias"])
def test_shapes_that_do_not_fit_raise_with_the_name(name):
    inputs = make(L=9)
    inputs[name] = inputs[name][..., :-1]
    # B says what N is.
    wrong = {"B": "C"}.get(name, name)
    with pytest.raises(ValueError, match=rf"ssd: {wrong} must have shape .* not .*with x \(1, 9, 4, 3\)"):
        ssd(**inputs)


def test_other_bad_arguments_raise():
    inputs = make(L=9)
    with pytest.raises(ValueError, match=r"x must be \(B, L, H, P\), not \(9, 4, 3\)"):
        ssd(**inputs | {"x": inputs["x"][0]})
    with pytest.raises(ValueError, match="B and C must both be"):
        ssd(**inputs | {"B": inputs["B"][:, :, 0]})
    with pytest.raises(ValueError, match="B's 3 groups do not divide x's 4 heads"):
        ssd(**inputs | {name: torch.randn(1, 9, 3, 5) for name in "BC"})
    with pytest.raises(TypeError, match=r"dt must be a floating-point tensor, not torch\.int64"):
        ssd(**inputs | {"dt": inputs["dt"].long()})
    with pytest.raises(ValueError, match=r"initial_state must have shape \(1, 4, 3, 5\), not \(2, 4, 3, 5\)"):
        ssd(**inputs, initial_state=torch.zeros(2, 4, 3, 5))
