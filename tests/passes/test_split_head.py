"""A loss of logits that nothing else needs is computed without them; whatever else may lie between stays as it was."""

import pytest
import torch
from harness import RIGHT, masks
from torch import nn
from torch.nn import functional as F

import packc
from packc.compiler import pack_graph
from packc.passes import split_head

V, D = 48, 8
OP = torch.ops.packc.linear_cross_entropy.default


def flat(logits, labels, **options):
    return F.cross_entropy(logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1), **options)


def padded_labels(logits, labels, **options):
    """As transformers writes it."""
    labels = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy(logits.float().view(-1, V), labels.view(-1), **options)


LOSSES = {
    "mean": flat,
    "labels padded": padded_labels,
    "sum over a number of items": lambda x, y: padded_labels(x, y, reduction="sum") / 7,
    "smoothed": lambda x, y: flat(x, y, label_smoothing=0.1),
    "another ignored label": lambda x, y: flat(x, y.masked_fill(y == -100, 3), ignore_index=3),
    "scaled": lambda x, y: flat(x / 3.0 * 0.5, y),
    "capped": lambda x, y: flat(torch.tanh(x / 4.0) * 4.0, y),
    "capped and scaled": lambda x, y: flat(torch.tanh(x * 0.3 / 2.0) * 2.0 * 0.7, y),
}
NOT = {
    "classes have weights": lambda x, y: flat(x, y, weight=torch.arange(V) * 1.0),
    "classes lie second": lambda x, y: F.cross_entropy(x[:, :-1].transpose(1, 2), y[:, 1:]),
    "something else than a cap": lambda x, y: flat(torch.sigmoid(x), y),
    "two losses": lambda x, y: flat(x, y) + flat(x, y.clamp(max=3)),
}


class Model(nn.Module):
    def __init__(self, loss, *, bias=True, classes=V, returns=True, made=lambda logits: logits):
        super().__init__()
        self.tokens, self.head = nn.Embedding(V, D), nn.Linear(D, classes, bias=bias)
        self.taps = nn.Parameter(torch.randn(D, 4))
        self.loss, self.returns, self.made = loss, returns, made

    def forward(self, ids, attention_mask, labels):
        logits = self.head(packc.ops.causal_conv1d(self.tokens(ids) * attention_mask[..., None], self.taps))
        loss = self.loss(logits, labels)
        return (loss, self.made(logits)) if self.returns else (loss,)


def batch():
    mask = masks(RIGHT)
    ids = torch.randint(0, V, mask.shape)
    return ids, mask, ids.masked_fill(mask == 0, -100)


def step(model, inputs):
    model.zero_grad()
    loss, *_ = model(*inputs)
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


def split(model, *, lazily=True):
    """The packed graph of a model, rewritten, and the tails."""
    found = []

    def backend(gm, inputs):
        packed = pack_graph(gm, inputs).gm
        found.append((packed, split_head(packed, lazily=lazily)))
        return gm

    torch.compile(model, backend=backend)(*batch())
    return found[-1]


def is_split(model, **options):
    packed, tails = split(model, **options)
    packed.graph.lint()
    assert len(tails) <= 1
    return any(node.target is OP for node in packed.graph.nodes)


QUICK = ("labels padded", "smoothed", "capped and scaled")


@pytest.mark.parametrize(
    "loss", [loss if loss in QUICK else pytest.param(loss, marks=pytest.mark.slow) for loss in LOSSES]
)
def test_a_loss_without_its_logits_equals_eager(loss):
    model, inputs = Model(LOSSES[loss]), batch()
    assert is_split(model)
    found = step(torch.compile(model, backend="packc", options={"packc.inner": "aot_eager"}), inputs)
    for value, expected in zip(found, step(model.double(), inputs), strict=True):
        assert (value.double() - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_losses_of_each_label_are_too():
    assert is_split(Model(lambda x, y: padded_labels(x, y, reduction="none")))


@pytest.mark.parametrize("loss", NOT)
def test_logits_that_something_else_needs_stay(loss):
    assert not is_split(Model(NOT[loss]))


def test_logits_that_are_returned_stay_unless_they_may_come_later():
    assert not is_split(Model(flat), lazily=False)
    assert is_split(Model(flat, returns=False), lazily=False)


RETURNED = {
    "in another dtype": lambda x: x.double(),
    "scaled": lambda x: x / 3.0,
}
COMPUTED = {
    "added up": lambda x: x.sum(-1),
    "in part": lambda x: x[..., :5],
    "times what the model computes": lambda x: x * x.new_ones(V).cumsum(0),
    "twice": lambda x: (x, x * 2),
    "without a gradient": lambda x: x.detach(),
    "dropped out": lambda x: F.dropout(x, 0.5),
}


@pytest.mark.parametrize("made", RETURNED)
def test_what_is_made_of_each_logit_alone_may_be_returned(made):
    assert is_split(Model(flat, made=RETURNED[made]))


@pytest.mark.parametrize("made", COMPUTED)
def test_anything_else_keeps_them(made):
    assert not is_split(Model(flat, made=COMPUTED[made]))


def test_few_classes_are_not_worth_it():
    classes = 4 * D - 1
    model = Model(
        lambda x, y: F.cross_entropy(x[:, :-1].reshape(-1, classes), y[:, 1:].reshape(-1) % classes), classes=classes
    )
    assert not is_split(model)


class Cast(Model):
    """Under an autocast of its own, as accelerate puts one around ``forward``."""

    def forward(self, ids, attention_mask, labels):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(ids, attention_mask, labels)


def test_a_head_under_an_autocast_in_the_graph_is_read_under_it_again():
    model, inputs = Cast(flat), batch()
    (tail,) = split(model)[1]
    assert tail.autocast == ("cpu", torch.bfloat16, True)
    lazy, at_once = (
        torch.compile(model, backend="packc", options={"packc.inner": "aot_eager", "packc.lazy_logits": each})(*inputs)
        for each in (True, False)
    )
    assert lazy[1].dtype is at_once[1].dtype is torch.bfloat16
    torch.testing.assert_close(lazy[0], at_once[0])
    torch.testing.assert_close(lazy[1] + 0, at_once[1])


class HeadCast(Model):
    def forward(self, ids, attention_mask, labels):
        hidden = packc.ops.causal_conv1d(self.tokens(ids) * attention_mask[..., None], self.taps)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = self.head(hidden)
        return self.loss(logits, labels), logits


def test_a_head_under_another_autocast_than_the_loss_stays():
    assert not is_split(HeadCast(flat))


def test_what_takes_no_gradient_stays():
    assert not is_split(Model(torch.no_grad()(flat)))
