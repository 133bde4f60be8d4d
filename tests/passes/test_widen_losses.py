"""A loss of cut logits is one of whole rows only where positions are told apart from classes."""

import pytest
import torch
from harness import RIGHT, RecordingBackend, masks
from torch.nn import functional as F

import packc

C = 4
TAPS = torch.randn(C, 3, generator=torch.Generator().manual_seed(1))
LOSSES = {
    "flattened": lambda x, y: F.cross_entropy(x[:, :-1].reshape(-1, C), y[:, 1:].reshape(-1)),
    "classes second": lambda x, y: F.cross_entropy(x[:, :-1].transpose(1, 2), y[:, 1:]),
    "in two steps": lambda x, y: F.nll_loss(x[:, :-1].log_softmax(-1).flatten(0, 1), y[:, 1:].flatten()),
    "in two steps, transposed": lambda x, y: F.nll_loss(x[:, :-1].transpose(1, 2).log_softmax(1), y[:, 1:]),
}
NOT = {
    "normalised over positions": lambda x, y: F.nll_loss(x[:, :-1].log_softmax(1).flatten(0, 1), y[:, 1:].flatten()),
    "normalised over tokens": lambda x, y: F.nll_loss(x[:, :-1].flatten(0, 1).log_softmax(0), y[:, 1:].flatten()),
    "shares of classes": lambda x, y: F.cross_entropy(x[:, :-1].flatten(0, 1), x[:, 1:].flatten(0, 1).softmax(-1)),
    "positions are classes": lambda x, y: F.cross_entropy(x[:, :-1], y[:, :C].clamp(min=0)),
}


def compared(loss):
    def model(x, attention_mask, labels):
        y = x * attention_mask[..., None]
        return loss(y, labels), packc.ops.causal_conv1d(y, TAPS)

    mask, backend = masks(RIGHT), RecordingBackend()
    x, labels = torch.randn(*mask.shape, C), torch.randint(0, C, mask.shape).masked_fill(mask == 0, -100)
    want, got = model(x, mask, labels), torch.compile(model, backend=backend)(x, mask, labels)
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1][mask.bool()], want[1][mask.bool()])
    return backend


@pytest.mark.parametrize("name", LOSSES)
def test_it_is_over_whole_rows(name):
    backend = compared(LOSSES[name])
    assert not any(node.name.startswith("slice") for node in logits_of(backend.after[-1]))


@pytest.mark.parametrize("name", NOT)
def test_what_is_not_position_by_position_is_left_alone(name):
    backend = compared(NOT[name])
    assert not backend.after or any(node.name.startswith("slice") for node in logits_of(backend.after[-1]))


def logits_of(gm):
    """What the logits of a loss are made from."""
    (loss,) = [node for node in gm.graph.nodes if "loss" in str(node.target)]
    found = [loss.args[0]]
    for node in found:
        found.extend(each for each in node.all_input_nodes if each not in found)
    return found
