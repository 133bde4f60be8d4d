"""A convolution that looks back only, however a model pads and cuts it, is packc's; any other stays as it was."""

import pytest
import torch
from harness import BOTH, LEFT, RIGHT, RecordingBackend, masks
from torch import nn
from torch.nn import functional as F

import packc

D, W = 4, 3
CONV = torch.ops.packc.causal_conv1d.default
STRICT = {"packc.inner": "aot_eager", "packc.strict": True}


def padded_by_the_module(x, conv):
    return conv(x)[..., : x.shape[-1]]


def cut_from_the_end(x, conv):
    return conv(x)[:, :, : -(W - 1)]


def padded_before(x, conv):
    return F.conv1d(F.pad(x, (W - 1, 0)), conv.weight, conv.bias, groups=D)


def of_width_one(x, conv):
    return F.conv1d(x, conv.weight[..., :1], groups=D)


def dilated(x, conv):
    return F.conv1d(F.pad(x, (4, 0)), conv.weight, dilation=2, groups=D)


def windows(x, conv):
    """With taps of each token's own, as well."""
    taps = conv.weight.flip(-1)[:, 0, None] * x.sin()[..., None]
    return (F.pad(x, (W - 1, 0)).unfold(-1, W, 1).flip(-1) * taps).sum(-1)


def windows_cut_to_length(x, conv):
    padded = F.pad(x, (W - 1, 0))[..., -(x.shape[-1] + W - 1) :]
    return (padded.unfold(2, W, 1) * conv.weight[:, 0, None]).sum(-1)


CAUSAL = [padded_by_the_module, cut_from_the_end, padded_before, of_width_one, dilated, windows, windows_cut_to_length]


def all_that_was_padded(x, conv):
    y = conv(x)
    return y[..., : x.shape[-1]] + y.sum()


def one_too_early(x, conv):
    return conv(x)[..., 1 : x.shape[-1] + 1]


def one_position_less(x, conv):
    return F.pad(conv(x)[..., : x.shape[-1] - 1], (0, 1))


def padded_behind(x, conv):
    return F.conv1d(F.pad(x, (0, W - 1)), conv.weight, groups=D)


def dilated_further_than_padded(x, conv):
    return F.pad(F.conv1d(F.pad(x, (W - 1, 0)), conv.weight, dilation=2, groups=D), (W - 1, 0))


def padded_with_ones(x, conv):
    return F.conv1d(F.pad(x, (W - 1, 0), value=1.0), conv.weight, groups=D)


def padded_with_its_end(x, conv):
    return F.conv1d(F.pad(x, (W - 1, 0), mode="circular"), conv.weight, groups=D)


def across_channels(x, conv):
    return F.conv1d(F.pad(x, (W - 1, 0)), conv.weight.expand(-1, 2, -1), groups=D // 2)


def windows_of_what_follows(x, conv):
    return (F.pad(x, (0, W - 1)).unfold(-1, W, 1) * conv.weight[:, 0, None]).sum(-1)


def windows_further_apart(x, conv):
    return (F.pad(x, (W - 1, 0)).unfold(-1, W, 2) * conv.weight[:, 0, None]).sum(-1).repeat_interleave(2, -1)


OTHERS = [
    windows_of_what_follows,
    windows_further_apart,
    all_that_was_padded,
    one_too_early,
    one_position_less,
    padded_behind,
    dilated_further_than_padded,
    padded_with_ones,
    padded_with_its_end,
    across_channels,
]


def model(function, bias=False):
    torch.manual_seed(0)
    conv = nn.Conv1d(D, D, W, padding=W - 1, groups=D, bias=bias)

    def run(x, attention_mask):
        x = x * attention_mask[..., None]
        return F.silu(function(x.transpose(1, 2), conv).transpose(1, 2))

    return run, conv


def outputs(run, conv, x, mask):
    out = run(x, mask)[mask.bool()]
    return out, *torch.autograd.grad(out.sin().sum(), [x, conv.weight])


@pytest.mark.parametrize("function", CAUSAL, ids=lambda function: function.__name__)
def test_it_packs(function):
    run, conv = model(function)
    compiled = torch.compile(run, backend="packc", options=STRICT)
    for rows in (RIGHT, LEFT, BOTH):
        x, mask = torch.randn(3, 8, D, requires_grad=True), masks(rows)
        torch.testing.assert_close(outputs(compiled, conv, x, mask), outputs(run, conv, x, mask))
    assert [mixer.packed for mixer in packc.explain(run)(x, mask).mixers] == [True]


@pytest.mark.parametrize("function", OTHERS, ids=lambda function: function.__name__)
def test_what_is_not_causal_or_not_of_every_channel_alone_stays(function):
    run, conv = model(function)
    backend, x, mask = RecordingBackend(), torch.randn(3, 8, D, requires_grad=True), masks(RIGHT)
    compiled = torch.compile(run, backend=backend)
    torch.testing.assert_close(outputs(compiled, conv, x, mask), outputs(run, conv, x, mask))
    assert not backend.after or backend.op_count(CONV) == 0


def test_under_autocast_it_has_the_dtype_that_the_convolution_had():
    run, _ = model(padded_by_the_module, bias=True)
    x, mask = torch.randn(3, 8, D), masks(RIGHT)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = torch.compile(run, backend="packc", options=STRICT)(x, mask), run(x, mask)
    assert actual.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=0.02, atol=0.02)
