"""Heads that people put on a backbone: it packs, and what they make of its tokens is stock's."""

import pytest
import torch
from harness import BOTH, HOLE, LEFT, RIGHT, PlainLM, batch_of, masks, tiny_mamba
from torch import nn
from torch.nn import functional as F

import packc

DEBUG = {"packc.inner": "aot_eager"}
EMPTY = ["11111111", "00000000", "11000000"]


def log_probs(logits, ids):
    return logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def next_tokens(model, ids, mask):
    """As preference losses and RL take them."""
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    return (log_probs(logits, ids[:, 1:]) * mask[:, 1:]).sum(-1)


def kept_logits(model, ids, mask):
    logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=5).logits[:, :-1]
    return (log_probs(logits, ids[:, -4:]) * mask[:, -4:]).sum(-1)


def clipped_ratio(model, ids, mask):
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1] / 0.7
    new = log_probs(logits, ids[:, 1:])
    old = torch.full_like(new, -3.0)
    advantages = torch.linspace(-1, 1, ids.shape[0])[:, None]
    ratio = (new - old).exp()
    loss = -torch.minimum(ratio * mask[:, 1:], (ratio * mask[:, 1:]).clamp(0.8, 1.2)) * advantages
    return loss.sum() / mask[:, 1:].sum()


def losses_of_tokens(model, ids, mask):
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    losses = F.cross_entropy(logits.reshape(-1, 32), ids[:, 1:].reshape(-1), reduction="none")
    return (losses.view(ids.shape[0], -1) * mask[:, 1:]).sum(-1)


def surprise(model, ids, mask):
    """Not finite of zeros: what is scattered there must not be what it is of zeros."""
    hidden = model(input_ids=ids, attention_mask=mask).logits[:, 1:]
    return (hidden.exp().sum(-1).sub(32).abs().log() * mask[:, 1:]).sum(-1)


def last_token(model, ids, mask):
    scores = model(input_ids=ids, attention_mask=mask).logits
    return scores[torch.arange(ids.shape[0]), mask.sum(1) - 1]


def last_token_by_gather(model, ids, mask):
    scores = model(input_ids=ids, attention_mask=mask).logits
    last = (mask * torch.arange(ids.shape[1])).argmax(1)
    return scores.gather(1, last[:, None, None].expand(-1, 1, scores.shape[-1])).squeeze(1)


def first_position(model, ids, mask):
    return model(input_ids=ids, attention_mask=mask).logits[:, 0].tanh()


def last_position(model, ids, mask):
    return model(input_ids=ids, attention_mask=mask).logits[:, -1]


HEADS = {
    head.__name__: head
    for head in (
        next_tokens,
        kept_logits,
        clipped_ratio,
        losses_of_tokens,
        surprise,
        last_token,
        last_token_by_gather,
        first_position,
        last_position,
    )
}
BY_DEFAULT = ("next_tokens", "last_token", "surprise")
each_head = pytest.mark.parametrize(
    "name", [*BY_DEFAULT, *(pytest.param(n, marks=pytest.mark.slow) for n in HEADS if n not in BY_DEFAULT)]
)


class Headed(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.model, self.head = tiny_mamba(layers=1), head

    def forward(self, input_ids, attention_mask):
        return self.head(self.model, input_ids, attention_mask)


def step(model, compiled, rows):
    batch = batch_of(rows)
    model.zero_grad()
    out = compiled(batch["input_ids"], batch["attention_mask"])
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters())]


@each_head
def test_value_and_gradients_are_those_of_eager(name, subtests):
    model = Headed(HEADS[name])
    compiled = torch.compile(model, backend="packc", options=DEBUG, fullgraph=True)
    for rows in (RIGHT, LEFT, BOTH, HOLE, EMPTY):
        with subtests.test(rows=rows):
            torch.manual_seed(1)
            actual = step(model, compiled, rows)
            torch.manual_seed(1)
            for got, wanted in zip(actual, step(model, model, rows), strict=True):
                torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


PADDING = {"first_position": ["00111111", "01111111"], "last_position": ["00111111", "11111111"]}


@each_head
def test_the_backbone_packs(name):
    batch = batch_of(PADDING.get(name, RIGHT))
    report = packc.explain(Headed(HEADS[name]))(batch["input_ids"], batch["attention_mask"])
    assert report.tokens is not None, report
    assert all(mixer.packed for mixer in report.mixers)
    if name != "first_position":
        assert (report.tokens, report.fallback) == (int(batch["attention_mask"].sum()), None)


def test_rows_whose_padding_a_head_reads_run_whole():
    batch = batch_of(["11111111", "11111000", "00000111"])
    report = packc.explain(Headed(last_position))(batch["input_ids"], batch["attention_mask"])
    assert report.tokens == 8 + 8 + 3
    assert "what a head reads" in report.fallback


def misaligned(model, ids, mask):
    logits = model(input_ids=ids, attention_mask=mask).logits
    return ((logits[:, 1:] - logits[:, :-1]).sum(-1) * mask[:, 1:]).sum(-1)


def unmasked(model, ids, mask):
    return log_probs(model(input_ids=ids, attention_mask=mask).logits[:, :-1], ids[:, 1:]).sum(-1)


def masked_by_the_model(model, ids, mask):
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    return (logits.sum(-1) * (logits.amax(-1) > 0)).sum(-1)


@pytest.mark.parametrize("head", [misaligned, unmasked, masked_by_the_model])
def test_a_head_that_reads_padding_is_not_packed(head):
    model, batch = Headed(head), batch_of(RIGHT)
    report = packc.explain(model)(batch["input_ids"], batch["attention_mask"])
    assert report.tokens is None
    assert "is not zero at padding" in report.fallback


def test_positions_that_are_left_out_of_the_result_are_zero_at_padding():
    model, batch = tiny_mamba(layers=1), batch_of(RIGHT)
    del batch["labels"]
    with torch.no_grad():
        actual = torch.compile(model, backend="packc", options=DEBUG)(**batch, logits_to_keep=5).logits
        expected = model(**batch, logits_to_keep=5).logits
    torch.testing.assert_close(actual, expected * batch["attention_mask"][:, -5:, None], rtol=1e-4, atol=1e-4)


def unmasked_places(model, ids, mask):
    return log_probs(model(input_ids=ids, attention_mask=mask).logits[:, :-1], ids[:, 1:])


def test_log_probabilities_are_computed_of_tokens_alone_and_cut_afterwards():
    model, batch = Headed(unmasked_places), batch_of(RIGHT)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    report = packc.explain(model)(ids, mask)
    assert (report.tokens, [boundary.node for boundary in report.boundaries]) == (15, ["aten.slice.Tensor"])
    actual = torch.compile(model, backend="packc", options={**DEBUG, "packc.strict": True})(ids, mask)
    torch.testing.assert_close(actual, model(ids, mask) * mask[:, :-1], rtol=1e-4, atol=1e-4)


def test_what_is_returned_of_cut_places_warns_of_left_padding():
    """A loss outside may count the first token's label, which lies on padding."""
    model, batch = Headed(unmasked_places), batch_of(LEFT)
    with pytest.warns(UserWarning, match="zero before a left-padded row's first token"):
        torch.compile(model, backend="packc", options=DEBUG)(batch["input_ids"], batch["attention_mask"])


HIDDEN = {
    "heads for tokens further on": lambda head, h, y: sum(
        F.cross_entropy(head(h[:, :-n] / n).flatten(0, 1), y[:, n:].flatten()) for n in (1, 2, 3)
    ),
    "the last tokens": lambda head, h, y: F.cross_entropy(head(h)[:, -3:].flatten(0, 1), y[:, -3:].flatten()),
    "the last tokens' hidden values": lambda head, h, y: F.cross_entropy(
        head(h[:, -4:])[:, :-1].flatten(0, 1), y[:, -3:].flatten(), reduction="sum"
    ),
    "all but the first tokens": lambda head, h, y: F.nll_loss(head(h[:, 2:]).log_softmax(-1).transpose(1, 2), y[:, 2:]),
}


@pytest.mark.parametrize("name", [n if "heads" in n else pytest.param(n, marks=pytest.mark.slow) for n in HIDDEN])
def test_losses_of_cut_hidden_values_pack(name):
    class Model(PlainLM):
        def forward(self, ids, mask, labels):
            return HIDDEN[name](self.head, self.hidden(ids, mask), labels)

    model = Model()
    compiled = torch.compile(model, backend="packc", options={**DEBUG, "packc.strict": True}, dynamic=True)
    for rows in (RIGHT, [*RIGHT, "11"], ["11111"] * 2):
        batch = batch_of([row.ljust(len(rows[0]), "0") for row in rows])
        given = batch["input_ids"], batch["attention_mask"], batch["labels"]
        got, want = (torch.autograd.grad(f(*given), list(model.parameters())) for f in (compiled, model))
        torch.testing.assert_close(got, want)


@pytest.mark.slow
def test_other_shapes_compile_nothing_new():
    model = Headed(next_tokens)
    compiled = torch.compile(model, backend="packc", options={**DEBUG, "packc.strict": True}, fullgraph=True)
    shapes = [RIGHT, [row + "00" for row in RIGHT], [*RIGHT, *RIGHT], ["111" + row for row in RIGHT[:2]]]
    for number, rows in enumerate(shapes):
        with torch._dynamo.config.patch(error_on_recompile=number > 2):
            step(model, compiled, rows)


def test_entries_that_one_row_alone_lines_up_along_other_axes_do_not_stay_in_their_places():
    """``(1, L, 1) - (1, L)`` is ``(1, L, L)``: of each position the difference to all others, padding among them."""
    taps = torch.randn(1, 2)

    def differences(x, attention_mask):
        x = packc.ops.causal_conv1d(x * attention_mask[..., None], taps)
        return x - x.select(2, 0)

    x, mask = torch.randn(1, 6, 1), masks(["111100"])
    compiled = torch.compile(differences, backend="packc", options=DEBUG)
    torch.testing.assert_close(compiled(x, mask), differences(x, mask))
    assert "is not zero at padding" in packc.explain(differences)(x, mask).fallback
