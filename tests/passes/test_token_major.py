"""Channel-first values are computed with channels last, where that is the same."""

from types import SimpleNamespace

import pytest
import torch
from harness import BOTH, LEFT, RIGHT, RecordingBackend, masks
from torch import fx, nn
from torch.nn import functional as F

from packc import passes

D, W = 4, 3
TRANSPOSE = torch.ops.aten.transpose.int


def gated(x, conv):
    before, after, x = x.transpose(1, 2).chunk(3, 1)
    return (after * conv(before * x)[..., : x.shape[2]].sigmoid()).transpose(1, 2)


def in_parts_of_several_sizes(x, conv):
    gate, x = x.transpose(-1, -2).split([2 * D, D], dim=-2)
    return (conv(x)[..., : x.shape[2]] * gate[:, :D]).transpose(1, 2)


def by_numbers(x, conv):
    return (2 - conv(x.transpose(2, 1)[:, :D] / 3)[..., : x.shape[1]].clamp(min=0.5)).transpose(1, 2)


def across_both(x, conv):
    """Of tokens against tokens."""
    return (x[..., :D].transpose(1, 2) + conv(x[..., :D].transpose(1, 2))[..., : x.shape[1]]).sum(1, keepdim=True).mT


def by_channels_weights(x, conv):
    return (conv(x[..., :D].transpose(1, 2))[..., : x.shape[1]] * conv.weight[:, 0, :1]).transpose(1, 2)


def halves_of_positions(x, conv):
    """Which is no cut of channels."""
    first, second = conv(x[..., :D].transpose(1, 2))[..., : x.shape[1]].split([3, x.shape[1] - 3], dim=2)
    return torch.cat([first, second], 2).transpose(1, 2)


class Model(nn.Module):
    def __init__(self, mix):
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.conv = mix, nn.Conv1d(D, D, W, groups=D, padding=W - 1)

    def forward(self, x, attention_mask):
        x = x * attention_mask[..., None]
        return self.mix(x, self.conv) * attention_mask[..., None]


@pytest.mark.parametrize("rows", [RIGHT, LEFT, BOTH])
@pytest.mark.parametrize(
    "mix", [gated, in_parts_of_several_sizes, by_numbers, across_both, by_channels_weights, halves_of_positions]
)
def test_results_and_gradients_are_the_same(mix, rows):
    mask, model = masks(rows), Model(mix)
    x = torch.randn(*mask.shape, 3 * D)
    found = []
    for call in (model, torch.compile(model, backend="packc", options={"packc.inner": "aot_eager"})):
        given = x.clone().requires_grad_()
        out = call(given, mask)
        found.append((out, *torch.autograd.grad(F.silu(out).sum(), [given, *model.parameters()])))
    for eager, packed in zip(*found, strict=True):
        torch.testing.assert_close(packed, eager)


@pytest.mark.parametrize("mix", [gated, in_parts_of_several_sizes, by_numbers])
def test_nothing_is_transposed_any_more(mix):
    backend, mask = RecordingBackend(), masks(RIGHT)
    torch.compile(Model(mix), backend=backend)(torch.randn(*mask.shape, 3 * D), mask)
    assert backend.op_count(torch.ops.packc.causal_conv1d.default) == 1
    assert backend.op_count(TRANSPOSE) == 0


def test_what_is_written_in_place_is_written_once():
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2, 3, D, device="meta")
    y = graph.call_function(TRANSPOSE, (x, 1, 2))
    tripled = graph.call_function(torch.ops.aten.mul_.Tensor, (y, 3.0))
    y.meta["val"] = tripled.meta["val"] = x.meta["val"].transpose(1, 2)
    graph.output(tripled)
    gm = passes.token_major(SimpleNamespace(gm=fx.GraphModule(nn.Module(), graph))).gm
    assert gm(torch.ones(2, 3, D)).eq(3).all()
