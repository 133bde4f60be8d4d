"""A convolution that looks back only, however a model pads and cuts it, is packc's; any other stays as it was."""

import pytest
import torch
from harness import BOTH, LEFT, RIGHT, RecordingBackend, masks
from rows import assert_documents_are_apart
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


def windows_of_what_follows(x, conv):
    return (F.pad(x, (0, W - 1)).unfold(-1, W, 1) * conv.weight[:, 0, None]).sum(-1)


def windows_further_apart(x, conv):
    return (F.pad(x, (W - 1, 0)).unfold(-1, W, 2) * conv.weight[:, 0, None]).sum(-1).repeat_interleave(2, -1)


def across_channels_from_far(x, conv):
    return F.conv1d(F.pad(x, (16, 0)), conv.weight.expand(-1, 2, -1)[..., :1].expand(-1, -1, 17), groups=D // 2)


def a_chain_one_too_late(x, conv):
    padded = F.pad(x, (2 * W - 1, 0))
    return F.conv1d(F.conv1d(padded, conv.weight, groups=D), conv.weight, groups=D)[..., :-1]


def a_chain_that_is_padded_too_far(x, conv):
    padded = F.pad(x, (2 * W - 1, 0))
    return F.conv1d(F.conv1d(padded, conv.weight, groups=D), conv.weight, groups=D)[..., 1:]


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
    across_channels_from_far,
    a_chain_one_too_late,
    a_chain_that_is_padded_too_far,
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


class Convs(nn.Module):
    """Several, of which each gets what the one before it gives, behind one padding."""

    def __init__(self, *convs, padded_by_itself=False):
        super().__init__()
        self.convs, self.padded_by_itself = nn.ModuleList(convs), padded_by_itself
        self.double()

    def forward(self, x, attention_mask=None):
        x = x if attention_mask is None else x * attention_mask[..., None]
        y, length = x.transpose(1, 2), x.shape[1]
        if not self.padded_by_itself:
            y = F.pad(y, (sum((conv.kernel_size[0] - 1) * conv.dilation[0] for conv in self.convs), 0))
        for conv in self.convs:
            y = conv(y)[..., :length] if self.padded_by_itself else conv(y)
        return F.silu(y.transpose(1, 2))


def several(kind):
    torch.manual_seed(0)
    of_each = nn.Conv1d(D, D, W, groups=D)
    return {
        "in groups": lambda: Convs(nn.Conv1d(D, 2 * D, W, groups=2)),
        "across all channels": lambda: Convs(nn.Conv1d(D, 3, W)),
        "across all channels, padded by itself": lambda: Convs(
            nn.Conv1d(D, D, W, padding=W - 1), padded_by_itself=True
        ),
        "in groups, without a bias, dilated": lambda: Convs(nn.Conv1d(D, D, W, groups=2, bias=False, dilation=2)),
        "of width one": lambda: Convs(nn.Conv1d(D, 3, 1)),
        "several of each channel": lambda: Convs(nn.Conv1d(D, 3 * D, W, groups=D)),
        "of each channel, then in groups": lambda: Convs(of_each, nn.Conv1d(D, D, 2, groups=2)),
        "in groups, then of each channel, then across all": lambda: Convs(
            nn.Conv1d(D, D, 2, groups=2), of_each, nn.Conv1d(D, 5, 2, bias=False)
        ),
        "of width one, then of each channel": lambda: Convs(nn.Conv1d(D, D, 1), of_each),
        "of which the first has no bias": lambda: Convs(nn.Conv1d(D, D, W, groups=D, bias=False), of_each),
        "each padded by itself": lambda: Convs(
            nn.Conv1d(D, D, W, groups=2, padding=W - 1), nn.Conv1d(D, D, 2, padding=1), padded_by_itself=True
        ),
    }[kind]()


SEVERAL = [
    "in groups",
    "across all channels",
    "across all channels, padded by itself",
    "in groups, without a bias, dilated",
    "of width one",
    "several of each channel",
    "of each channel, then in groups",
    "in groups, then of each channel, then across all",
    "of width one, then of each channel",
    "of which the first has no bias",
]
LONGEST = "in groups, then of each channel, then across all"


def of_tokens(call, model, x, mask):
    out = call(x, mask)[mask.bool()]
    return out, *torch.autograd.grad(out.sin().sum(), [x, *model.parameters()])


@pytest.mark.parametrize("kind", SEVERAL)
def test_across_channels_and_one_behind_the_other_it_packs(kind):
    model = several(kind)
    compiled = torch.compile(model, backend="packc", options=STRICT)
    for rows in (RIGHT, LEFT, BOTH):
        x, mask = torch.randn(3, 8, D, dtype=torch.float64, requires_grad=True), masks(rows)
        torch.testing.assert_close(of_tokens(compiled, model, x, mask), of_tokens(model, model, x, mask))
    report = packc.explain(model)(x, mask)
    assert all(mixer.packed for mixer in report.mixers)
    assert not report.boundaries


@pytest.mark.parametrize(
    "kind", [kind if kind == LONGEST else pytest.param(kind, marks=pytest.mark.slow) for kind in SEVERAL]
)
def test_nothing_passes_from_document_to_document(kind):
    assert_documents_are_apart(several(kind), torch.randn(2, 8, D, dtype=torch.float64), options=STRICT)


def test_each_with_its_own_padding_sees_zeros_there():
    """And the bias of the one before it at left padding: such rows stay whole."""
    model = several("each padded by itself")
    compiled = torch.compile(model, backend="packc", options={"packc.inner": "aot_eager"})
    for rows in (RIGHT, LEFT):
        x, mask = torch.randn(3, 8, D, dtype=torch.float64, requires_grad=True), masks(rows)
        torch.testing.assert_close(of_tokens(compiled, model, x, mask), of_tokens(model, model, x, mask))
    assert packc.explain(model)(x, mask).tokens == mask.numel()


def test_in_bf16_a_chain_is_as_exact_as_stocks():
    model = several("of each channel, then in groups")
    x, mask = torch.randn(3, 8, D, dtype=torch.float64), masks(RIGHT)
    exact = model(x, mask)[mask.bool()]
    model, x = model.bfloat16(), x.bfloat16()
    stock, packed = model(x, mask), torch.compile(model, backend="packc", options=STRICT)(x, mask)
    errors = [(each[mask.bool()] - exact).square().mean() for each in (stock, packed)]
    assert packed.dtype == torch.bfloat16
    assert errors[1] < 2 * errors[0]
