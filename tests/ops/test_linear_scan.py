"""The linear scan's own tests; what it shares with other mixers is in test_mixers.py."""

import pytest
import torch
from mixers import MIXERS, assert_close, exactly, run
from selective_scan_data import offsets, relative_error
from torch._higher_order_ops.associative_scan import associative_scan
from torch.utils.flop_counter import FlopCounterMode

from packc import config
from packc.ops import linear_scan

MIXER = MIXERS["linear_scan"]


def make(*shape):
    return {"a": torch.sigmoid(torch.randn(shape) + 2), "b": torch.randn(shape)}


def agrees_with_fp64(inputs, cu_seqlens=None, state=None, tolerance=1e-5):
    assert_close(run(MIXER, inputs, cu_seqlens, state), exactly(MIXER, inputs, cu_seqlens, state), tolerance)


# ---- shapes and memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trailing", [(), (1,), (2,), (7,), (16,), (33,), (70,), (3, 5), (2, 1, 3), (0,), (2, 0)])
def test_any_trailing_shape(kernels, trailing):
    inputs, state = make(1, 19, *trailing), torch.randn(2, *trailing)
    results = run(MIXER, inputs, offsets([2, 17]), state)
    assert results["out"].shape == results["db"].shape == (1, 19, *trailing)
    assert results["final_state"].shape == results["dinitial_state"].shape == (2, *trailing)
    if 0 not in trailing:
        agrees_with_fp64(inputs, offsets([2, 17]), state)
        agrees_with_fp64(make(3, 5, *trailing), None, torch.randn(3, *trailing))


def test_more_channels_than_a_task_takes():
    agrees_with_fp64(make(1, 18, 4099), offsets([17, 1]), torch.randn(2, 4099))
    strided = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in make(1, 18, 4099).items()}
    agrees_with_fp64(strided, offsets([17, 1]), torch.randn(2, 4099))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: torch.cat([x, torch.full_like(x, torch.nan)], -1)[..., : x.shape[-1]],
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: x[..., :1].expand(x.shape),
    ],
)
def test_trailing_axes_that_are_not_one_axis_in_memory(kernels, view):
    inputs = {name: view(x) for name, x in make(2, 18, 3, 4).items()}
    contiguous = {name: x.contiguous() for name, x in inputs.items()}
    assert_close(run(MIXER, inputs), run(MIXER, contiguous), 0)
    assert all(x.is_contiguous() for x in run(MIXER, inputs).values())


def test_one_strided_input_among_contiguous_ones(kernels):
    inputs, state = make(1, 34, 20), torch.randn(2, 20)
    expected = run(MIXER, inputs, offsets([4, 30]), state)
    for name in inputs:
        mixed = {**inputs, name: inputs[name].transpose(1, 2).contiguous().transpose(1, 2)}
        assert_close(run(MIXER, mixed, offsets([4, 30]), state), expected, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", ["a", "b"])
def test_mixed_dtypes(kernels, dtype, wide):
    inputs = {name: x if name == wide else x.to(dtype) for name, x in make(1, 37, 18).items()}
    dout = torch.randn_like(inputs["b"])
    results, exact = run(MIXER, inputs, dout=dout), exactly(MIXER, inputs, dout=dout)
    with config.patch(kernels="reference"):
        plain = run(MIXER, {name: x.float() for name, x in inputs.items()}, dout=dout)
    assert results["out"].dtype == inputs["b"].dtype
    for name, x in results.items():
        if name[1:] in inputs:
            assert x.dtype == inputs[name[1:]].dtype, name
        # Interpreted, Triton truncates to bf16.
        slack = torch.finfo(x.dtype).eps / 2 if kernels == "triton" else 0
        rounded = relative_error(plain[name].to(x.dtype), exact[name])
        assert relative_error(x, exact[name]) <= max(2 * rounded + slack, 1e-5), name


# ---- values ----------------------------------------------------------------------------------------------------------


def test_equals_an_associative_scan(kernels):
    inputs = make(2, 37, 5)
    results = run(MIXER, inputs)
    leaves = [x.requires_grad_() for x in inputs.values()]

    def combine(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    _, h = associative_scan(combine, tuple(leaves), 1, combine_mode="generic")
    assert_close({"out": results["out"]}, {"out": h.detach()})


def test_a_decay_of_one_sums_and_of_zero_forgets(kernels):
    inputs = make(1, 40, 3)
    inputs["a"] = torch.tensor([1.0, 0.0, -1.0]).expand(1, 40, 3)
    sign = torch.tensor([1.0, -1.0]).repeat(20)
    b = inputs["b"][0]
    expected = torch.stack([b[:, 0].cumsum(0), b[:, 1], sign * (sign * b[:, 2]).cumsum(0)], -1)
    torch.testing.assert_close(linear_scan(**inputs)[0], expected)


def test_decays_near_zero_and_one(kernels):
    decays = torch.tensor([0.0, 1e-38, 1e-20, 1e-4, 1 - 1e-4, 1 - 1e-7, 1.0, -0.999, 1.02])
    inputs = {"a": decays.expand(1, 130, 9), "b": torch.randn(1, 130, 9)}
    state = torch.randn(2, 9)
    results, exact = run(MIXER, inputs, offsets([90, 40]), state), exactly(MIXER, inputs, offsets([90, 40]), state)
    for i in range(9):
        assert_close(*({name: x[..., i] for name, x in each.items()} for each in (results, exact)))


def test_zeros_stay_zeros_however_fast_they_would_grow(kernels):
    a, b, dout = torch.full((1, 200, 2), 8.0), torch.zeros(1, 200, 2), torch.zeros(1, 200, 2)
    b[:, -3:], dout[:, :3] = 1, 1
    results = run(MIXER, {"a": a, "b": b}, dout=dout, dfinal=torch.zeros(1, 2))
    assert results["out"][0, :, 0].tolist() == [0] * 197 + [1, 9, 73]
    assert results["db"][0, :, 0].tolist() == [73, 9, 1] + [0] * 197
    assert not results["da"].any()


@pytest.mark.parametrize("lengths", [[128, 64, 8], [64, 16, 49, 15, 1]])
def test_documents_that_end_where_chunks_and_segments_do(kernels, lengths):
    inputs = make(1, sum(lengths), 2)
    # What leaks, from either side, is not forgotten before it shows.
    inputs["a"] = 1 - inputs["a"] / 100
    agrees_with_fp64(inputs, offsets(lengths), torch.randn(len(lengths), 2))


# ---- the op ----------------------------------------------------------------------------------------------------------


def test_flops():
    inputs = {name: x.requires_grad_() for name, x in make(2, 10, 3).items()}
    with FlopCounterMode(display=False) as counter:
        linear_scan(**inputs).sum().backward()
    assert counter.get_total_flops() == (2 + 5) * 60


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"a": torch.ones(1, 4, 1)}, r"a must have shape \(1, 4, 3\), not \(1, 4, 1\), with b \(1, 4, 3\)"),
        ({"a": torch.ones(4, 3)}, r"a must have shape \(1, 4, 3\), not \(4, 3\)"),
        ({"b": torch.ones(4)}, r"b must be \(B, L, ...\), not \(4,\)"),
        ({"initial_state": torch.ones(2, 3)}, r"initial_state must have shape \(1, 3\), not \(2, 3\), with b"),
        ({"initial_state": torch.ones(1, 4, 3)}, r"initial_state must have shape \(1, 3\), not \(1, 4, 3\)"),
        ({"a": torch.ones(2, 4, 3), "b": torch.ones(2, 4, 3), "cu_seqlens": offsets([4])}, "b must be one packed row"),
        ({"cu_seqlens": offsets([4]), "initial_state": torch.ones(2, 3)}, r"initial_state must have shape \(1, 3\)"),
    ],
)
def test_shapes_that_do_not_fit_raise(wrong, message):
    with pytest.raises(ValueError, match=message):
        linear_scan(**{**make(1, 4, 3), **wrong})


@pytest.mark.parametrize("name", ["a", "b", "initial_state"])
def test_dtypes_that_are_not_floating_raise(name):
    arguments = {**make(1, 4, 3), "initial_state": torch.zeros(1, 3)}
    arguments[name] = arguments[name].long()
    with pytest.raises(TypeError, match=f"linear_scan: {name} must be a floating-point tensor, not torch.int64"):
        linear_scan(**arguments)


@pytest.mark.gpu
def test_offsets_past_two_to_the_31_elements(kernels):
    if kernels != "gpu":
        pytest.skip("needs 30 GiB, on a GPU")
    T, D = 2**20 + 5, 2**11 + 64  # T * D > 2**31
    tail = make(1, 3, D)
    a, b = (torch.zeros(1, T, D, dtype=torch.bfloat16) for _ in range(2))
    a[:, -3:], b[:, -3:] = tail["a"], tail["b"]
    short = {name: x.bfloat16() for name, x in tail.items()}
    assert torch.equal(linear_scan(a, b, cu_seqlens=offsets([T - 3, 3]))[:, -3:], linear_scan(**short))
