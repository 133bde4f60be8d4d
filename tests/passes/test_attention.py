"""Attention runs padded inside a packed graph where its mask hides padding, and nowhere else."""

import pytest
import torch
from harness import BOTH, HOLE, LEFT, RIGHT, RecordingBackend, masks
from torch.nn import functional as F

import packc

B, L, H, D = 3, 8, 2, 4
TAPS = torch.randn(H * D, 3, generator=torch.Generator().manual_seed(1))
STRICT = {"packc.inner": "aot_eager", "packc.strict": True}
CAUSAL = torch.ones(L, L, dtype=torch.bool).tril()  # to the graph, an input that may hold anything


def heads(x):
    return x.unflatten(-1, (H, D)).transpose(1, 2)


def attend(x, attention_mask, mask=None, **options):
    """A mixer of packc's, attention over what it gives, and what is done token by token afterwards."""
    x = packc.ops.causal_conv1d(x * attention_mask[..., None], TAPS, activation="silu")
    mixed = F.scaled_dot_product_attention(heads(x), heads(x.cos()), heads(x.sin()), attn_mask=mask, **options)
    return F.layer_norm(x + mixed.transpose(1, 2).flatten(2), (H * D,))


def causal(m):
    places = torch.arange(m.shape[1])
    return (places <= places[:, None]) & (m[:, None, None] != 0)


def additive(m):
    return torch.zeros(m.shape[0], 1, m.shape[1], m.shape[1]).masked_fill(~causal(m), torch.finfo(torch.float32).min)


def also_seen_by_padding(m):
    return causal(m) | (m[:, None, :, None] == 0)  # as where no row may be hidden from everything


HIDING = {
    "causal": causal,
    "additive": additive,
    "of keys": lambda m: m[:, None, None] != 0,
    "of keys, additive": lambda m: (1.0 - m[:, None, None].float()) * -1e9,
    "causal by a buffer": lambda m: CAUSAL & (m[:, None, None] != 0),
    "a window": lambda m: causal(m) & ~causal(m).tril(-3),
    "of one document": lambda m: causal(m) & (m[:, None, None] == m[:, None, :, None]),
    "biased": lambda m: additive(m) + TAPS[0, 0],
    "open to padding's own queries": also_seen_by_padding,
}
SHOWING = {
    "padding in the past": lambda m: CAUSAL.expand(B, 1, L, L),
    "everything": lambda m: torch.ones(B, 1, L, L, dtype=torch.bool),
    "padding alone": lambda m: m[:, None, None] == 0,
    "shifted": lambda m: F.pad(m, (1, 0))[:, None, None, :-1] != 0,
    "another row's": lambda m: m.flip(0)[:, None, None] != 0,
    "a little": lambda m: torch.where(m[:, None, None] != 0, 0.0, -10.0),
}


def step(function, x, *args):
    leaf = x.clone().requires_grad_()
    out = function(leaf, *args)
    real = args[0].bool()
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (grad,) = torch.autograd.grad((out * weight)[real].sum(), leaf)
    return out[real], grad


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", HIDING)
def test_a_mask_that_hides_padding_lets_the_graph_pack(name, dynamic):
    torch._dynamo.reset()

    def model(x, attention_mask):
        return attend(x, attention_mask, HIDING[name](attention_mask))

    compiled = torch.compile(model, backend="packc", options=STRICT, dynamic=dynamic)
    x = torch.randn(B, L, H * D)
    for rows in (RIGHT, LEFT, BOTH):
        torch.testing.assert_close(step(compiled, x, masks(rows)), step(model, x, masks(rows)), rtol=1e-4, atol=1e-5)
    report = packc.explain(model)(x, masks(RIGHT))
    assert (report.tokens, len(report.boundaries)) == (15, 1)
    assert report.boundaries[0].node == "aten.scaled_dot_product_attention.default"


def test_rows_that_stay_whole_attend_as_stock_does():
    torch._dynamo.reset()

    def model(x, attention_mask):
        return attend(x, attention_mask, causal(attention_mask))

    compiled = torch.compile(model, backend="packc", options={**STRICT, "packc.strict": False})
    x = torch.randn(B, L, H * D)
    with pytest.warns(UserWarning, match="1 of 3 rows padded: padding between"):
        actual = step(compiled, x, masks(HOLE))
    torch.testing.assert_close(actual, step(model, x, masks(HOLE)), rtol=1e-4, atol=1e-5)


def reason_of(model, *inputs):
    torch._dynamo.reset()
    backend = RecordingBackend()
    actual = torch.compile(model, backend=backend)(*inputs)
    torch.testing.assert_close(actual, model(*inputs))
    (reason,) = backend.reasons
    return reason


@pytest.mark.parametrize("name", SHOWING)
def test_one_that_shows_padding_does_not(name):
    def model(x, attention_mask):
        return attend(x, attention_mask, SHOWING[name](attention_mask))

    assert "is not seen to hide padding" in reason_of(model, torch.randn(B, L, H * D), masks(BOTH))


def test_one_made_of_another_mask_does_not():
    def model(x, attention_mask, ref_mask):
        return attend(x, attention_mask, causal(ref_mask))

    assert "is not seen to hide padding" in reason_of(model, torch.randn(B, L, H * D), masks(RIGHT), masks(LEFT))


def test_causal_attention_without_a_mask_keeps_left_padding():
    torch._dynamo.reset()

    def model(x, attention_mask):
        return attend(x, attention_mask, is_causal=True)

    x = torch.randn(B, L, H * D)
    compiled = torch.compile(model, backend="packc", options={**STRICT, "packc.strict": False})
    torch.testing.assert_close(step(compiled, x, masks(RIGHT)), step(model, x, masks(RIGHT)), rtol=1e-4, atol=1e-5)
    assert packc.explain(model)(x, masks(RIGHT)).tokens == 15
    with pytest.warns(UserWarning, match="2 of 3 rows padded: .*attention without a mask reads left padding"):
        actual = step(compiled, x, masks(LEFT))
    torch.testing.assert_close(actual, step(model, x, masks(LEFT)), rtol=1e-4, atol=1e-5)


def test_attention_to_everything_is_refused():
    reason = reason_of(lambda x, attention_mask: attend(x, attention_mask), torch.randn(B, L, H * D), masks(RIGHT))
    assert "attends to padding" in reason


def test_attention_to_another_sequence_is_refused():
    def model(x, attention_mask, y, ref_mask):
        x = packc.ops.causal_conv1d(x * attention_mask[..., None], TAPS)
        y = packc.ops.causal_conv1d(y * ref_mask[..., None], TAPS)
        mixed = F.scaled_dot_product_attention(heads(x), heads(y), heads(y), attn_mask=ref_mask[:, None, None] != 0)
        return x + mixed.transpose(1, 2).flatten(2)

    x, y = torch.randn(2, B, L, H * D)
    assert "two sequences meet" in reason_of(model, x, masks(RIGHT), y, masks(LEFT))


def test_what_attention_gives_at_padding_is_read_by_nobody():
    def model(x, attention_mask):
        return attend(x, attention_mask, causal(attention_mask)).mean(1)

    assert "mean" in reason_of(model, torch.randn(B, L, H * D), masks(RIGHT))


def test_a_label_before_a_rows_first_token_keeps_the_row_whole():
    torch._dynamo.reset()

    def model(x, attention_mask, labels):
        logits = attend(x, attention_mask, also_seen_by_padding(attention_mask))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    x, mask = torch.randn(B, L, H * D), masks(LEFT)
    labels = torch.randint(0, H * D, (B, L)).masked_fill(mask == 0, -100)
    compiled = torch.compile(model, backend="packc", options={**STRICT, "packc.strict": False})
    with pytest.warns(UserWarning, match="2 of 3 rows padded: the position before a row"):
        actual = compiled(x, mask, labels)
    torch.testing.assert_close(actual, model(x, mask, labels))
