"""Labels that are an input, a few positions on, are asked of it: the ops that shift them run in the loss alone."""

import pytest
import torch
from harness import masks
from torch import nn
from torch.nn import functional as F

import packc
from packc.compiler import compile_graph
from packc.facts import Labelled, Rows, facts_of

MASK = masks(["11100", "11111", "00111"])


def by_cut(logits, labels):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def by_two(logits, labels):
    return F.cross_entropy(logits[:, :-2].flatten(0, 1), labels[:, 2:].flatten())


def by_pad(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1), F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous().view(-1))


def of_the_tokens(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1), labels.view(-1))


def with_another_filler(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1), F.pad(labels, (0, 1), value=3)[:, 1:].reshape(-1))


def of_the_token_before(logits, labels):
    return F.cross_entropy(logits[:, 1:].flatten(0, 1), labels[:, :-1].flatten())


def of_other_numbers(logits, labels):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), (labels * 1)[:, 1:].flatten())


class Model(nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.tokens, self.taps, self.loss = nn.Embedding(9, 4), nn.Parameter(torch.ones(4, 2)), loss

    def forward(self, ids, mask, labels):
        x = self.tokens(ids) * mask[..., None]
        return self.loss(packc.ops.causal_conv1d(x, self.taps) @ self.tokens.weight.T, labels)


def asked(loss):
    """What the packed graph asks of labels, and its inputs."""
    found = []

    def backend(gm, inputs):
        with packc.config.patch(inner="eager"):
            call, _ = compile_graph(gm, inputs)
        return lambda *given: found.append((call, given)) or call(*given)

    backend.__packc_backend__ = True
    ids = torch.arange(15).view(3, 5) % 9
    torch.compile(Model(loss), backend=backend)(ids, MASK, ids.masked_fill(MASK == 0, -100))
    ((call, inputs),) = found
    ((labels,),) = (stream.labels for stream in call.streams)
    return labels, inputs


@pytest.mark.parametrize(("loss", "ahead"), [(by_cut, 1), (by_two, 2), (by_pad, 1), (of_the_tokens, 0)])
def test_labels_some_positions_on_are_those_of_an_input(loss, ahead):
    labels, inputs = asked(loss)
    assert labels.ahead == ahead
    moved = Labelled(inputs[labels.input], labels.ignore_index, labels.ahead)
    computed = Labelled(labels.graph(*inputs), labels.ignore_index)
    assert facts_of([Rows(MASK, [moved])])[0].rows == facts_of([Rows(MASK, [computed])])[0].rows


@pytest.mark.parametrize("loss", [with_another_filler, of_the_token_before, of_other_numbers])
def test_labels_that_are_anything_else_are_computed(loss):
    assert asked(loss)[0].input is None
