"""Which masks let attention pack, with which the rest packs around it, and which say nothing of padding."""

import sys

import pytest
import torch
from harness import BOTH, LEFT, RIGHT, masks
from masked_attention import ATTENTION, CONV, STRICT, TAPS, B, D, H, L, attend, causal, heads, reason_of, step
from torch.nn import functional as F

import packc

WEIGHT = torch.randn(H * D, H * D, generator=torch.Generator().manual_seed(3))
CAUSAL = torch.ones(L, L, dtype=torch.bool).tril()  # to the graph, an input that may hold anything


def additive(m):
    return torch.zeros(m.shape[0], 1, m.shape[1], m.shape[1]).masked_fill(~causal(m), torch.finfo(torch.float32).min)


def also_seen_by_padding(m):
    return causal(m) | (m[:, None, :, None] == 0)  # as where no row may be hidden from everything


def window(m, size):
    places = torch.arange(m.shape[1])
    return causal(m) & (places > places[:, None] - size)


def chunks(m, size):
    """Of each row's tokens, counted from its first."""
    chunk = (torch.arange(m.shape[1]) - (m.cumsum(1) == 0).sum(1, keepdim=True)) // size
    return causal(m) & (chunk[:, None, None] == chunk[:, None, :, None])


PACKED = {
    "causal": causal,
    "additive": additive,
    "of keys": lambda m: m[:, None, None] != 0,
    "of keys, additive": lambda m: (1.0 - m[:, None, None].float()) * -1e9,
    "a window": lambda m: window(m, 3),
    "a window by a triangle": lambda m: causal(m) & ~causal(m).tril(-3),
    "a window beyond the batch": lambda m: window(m, 100),
    "a window on both sides": lambda m: (window(m, 3) | window(m, 3).mT) & (m[:, None, None] != 0),
    "chunks": lambda m: chunks(m, 3),
    "chunks, additive": lambda m: torch.where(chunks(m, 2), 0.0, -1e9),
    "of one document": lambda m: causal(m) & (m[:, None, None] == m[:, None, :, None]),
    "open to padding's own queries": also_seen_by_padding,
}
HIDING = {
    **PACKED,
    "causal by an input": lambda m: CAUSAL & (m[:, None, None] != 0),
    "biased": lambda m: additive(m) + TAPS[0, 0],
    "chunks of rows": lambda m: causal(m) & (torch.arange(m.shape[1]) // 4 == (torch.arange(m.shape[1]) // 4)[:, None]),
    "all but itself": lambda m: (m[:, None, None] != 0) & ~torch.eye(m.shape[1], dtype=torch.bool),
    "a head's own": lambda m: torch.cat([window(m, 2), window(m, 3)], 1),
}
SLOW = {
    "of keys, additive",
    "a window by a triangle",
    "a window beyond the batch",
    "of one document",
    "biased",
    "all but itself",
    "chunks, additive",
}
SHOWING = {
    "padding in the past": lambda m: CAUSAL.expand(B, 1, L, L),
    "everything": lambda m: torch.ones(B, 1, L, L, dtype=torch.bool),
    "padding alone": lambda m: m[:, None, None] == 0,
    "shifted": lambda m: F.pad(m, (1, 0))[:, None, None, :-1] != 0,
    "another row's": lambda m: m.flip(0)[:, None, None] != 0,
    "a little": lambda m: torch.where(m[:, None, None] != 0, 0.0, -10.0),
}


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in HIDING])
def test_a_mask_that_hides_padding_lets_the_graph_pack(name, dynamic):

    def model(x, attention_mask):
        return attend(x, attention_mask, HIDING[name](attention_mask))

    compiled = torch.compile(model, backend="packc", options=STRICT, dynamic=dynamic)
    x = torch.randn(B, L, H * D)
    for rows in (RIGHT, LEFT, BOTH):
        torch.testing.assert_close(step(compiled, x, masks(rows)), step(model, x, masks(rows)), rtol=1e-4, atol=1e-5)
    report = packc.explain(model)(x, masks(RIGHT))
    assert report.tokens == 15
    assert [mixer.op for mixer in report.mixers if mixer.packed] == [CONV, ATTENTION][: 1 + (name in PACKED)]
    assert [boundary.node for boundary in report.boundaries] == [ATTENTION][name in PACKED :]


def test_chunks_are_cut_from_where_each_document_begins():
    def model(x, attention_mask):
        return attend(x, attention_mask, chunks(attention_mask, 3))

    torch._dynamo.reset()
    compiled = torch.compile(model, backend="packc", options=STRICT)
    x, ones = torch.randn(1, L, H * D), torch.ones(1, L, dtype=torch.int64)
    with packc.documents(cu_seqlens=torch.tensor([0, 4, L])):
        out = compiled(x, ones)
    alone = [model(x[:, some], ones[:, some]) for some in (slice(4), slice(4, L))]
    torch.testing.assert_close(out, torch.cat(alone, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SHOWING)
def test_one_that_shows_padding_does_not(name):
    def model(x, attention_mask):
        return attend(x, attention_mask, SHOWING[name](attention_mask))

    assert "is not seen to hide padding" in reason_of(model, torch.randn(B, L, H * D), masks(BOTH))


END = 50256


def documents(ids):
    return (ids == END).cumsum(1)


OF_IDS = {
    "documents behind an id": lambda m, ids: (
        causal(m) & (documents(ids)[:, None, None] == documents(ids)[:, None, :, None])
    ),
    "tokens that nobody sees": lambda m, ids: causal(m) & (ids < END)[:, None, None],
    "a prefix": lambda m, ids: causal(m) | ((m != 0) & (documents(ids) == 0))[:, None, None],
    "numbers that are computed with": lambda m, ids: causal(m) & ((ids + 94).remainder(END + 94) != 0)[:, None, None],
}


@pytest.mark.parametrize(
    "name",
    [
        each if "documents" in each or "computed" in each else pytest.param(each, marks=pytest.mark.slow)
        for each in OF_IDS
    ],
)
def test_one_that_token_ids_tell_apart_leaves_the_rest_packed(name):
    def model(x, attention_mask, ids):
        return attend(x, attention_mask, OF_IDS[name](attention_mask, ids))

    compiled = torch.compile(model, backend="packc", options=STRICT)
    x, ids = torch.randn(B, L, H * D), torch.full((B, L), 1000)
    ids[0, 3] = ids[1, 1] = ids[1, 3] = ids[2, 0] = END
    torch.testing.assert_close(step(compiled, x, masks(RIGHT), ids), step(model, x, masks(RIGHT), ids))
    report = packc.explain(model)(x, masks(RIGHT), ids)
    assert [boundary.node for boundary in report.boundaries] == [ATTENTION]


def test_one_that_shows_padding_behind_an_id_does_not():
    def model(x, attention_mask, ids):
        shown = causal(attention_mask) | (documents(ids)[:, None, :, None] > 0)
        return attend(x, attention_mask, shown)

    assert "hide padding" in reason_of(model, torch.randn(B, L, H * D), masks(RIGHT), torch.zeros(B, L).long())


def test_one_made_of_another_mask_does_not():
    def model(x, attention_mask, ref_mask):
        return attend(x, attention_mask, causal(ref_mask))

    assert "is not seen to hide padding" in reason_of(model, torch.randn(B, L, H * D), masks(RIGHT), masks(LEFT))


def biased(x, m, weight, bias):
    """Relative positions by what the model computes of tokens, as a bias: hidden where the mask hides."""
    x = packc.ops.causal_conv1d(x * m[..., None], TAPS, activation="silu")
    places = torch.arange(x.shape[1])
    distances = (places[:, None] - places).clamp(0, D - 1).expand(x.shape[0], H, -1, -1)
    mask = torch.where(causal(m), bias(heads(F.linear(x, weight)), distances), torch.finfo(x.dtype).min)
    mixed = F.scaled_dot_product_attention(heads(x), heads(x.cos()), heads(x.sin()), attn_mask=mask)
    return F.layer_norm(x + mixed.transpose(1, 2).flatten(2), (H * D,))


@pytest.mark.parametrize(
    "bias",
    [lambda h, distances: (h / 2).gather(3, distances), lambda h, distances: h.gather(3, distances).mT],
    ids=["each query", "each key"],
)
@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_bias_of_tokens_leaves_the_rest_packed(bias, dynamic):

    def model(x, attention_mask, weight):
        return biased(x, attention_mask, weight, bias)

    compiled = torch.compile(model, backend="packc", options=STRICT, dynamic=dynamic)
    x, weight = torch.randn(B, L, H * D), torch.nn.Parameter(WEIGHT)
    for rows in (RIGHT, LEFT, BOTH):
        given = masks(rows), weight
        torch.testing.assert_close(step(compiled, x, *given), step(model, x, *given), rtol=1e-4, atol=1e-5)
    report = packc.explain(model)(x, *given)
    assert [mixer.op for mixer in report.mixers if mixer.packed] == [CONV]
    assert ATTENTION in [boundary.node for boundary in report.boundaries]


@pytest.mark.parametrize(
    "bias",
    [
        lambda h, distances: h.cumsum(2).gather(3, distances),
        lambda h, distances: h.gather(3, distances) - h.gather(3, distances).amax(2, keepdim=True),
        lambda h, distances: h.gather(3, distances).flip(2),
    ],
    ids=["queries before", "all queries", "another query"],
)
def test_a_bias_of_other_tokens_does_not(bias):
    def model(x, attention_mask, weight):
        return biased(x, attention_mask, weight, bias)

    given = torch.randn(B, L, H * D), masks(RIGHT), torch.nn.Parameter(WEIGHT)
    assert "is not zero at padding" in reason_of(model, *given)


def test_a_window_that_the_graph_is_given_is_heeded_when_it_changes():

    def model(x, attention_mask, size):
        return attend(x, attention_mask, window(attention_mask, size))

    compiled = torch.compile(model, backend="packc", options=STRICT, dynamic=True)
    for length, size in ((4, 7), (20, 7), (20, 3)):
        given = masks(["1" * length, "1" * (length - 1) + "0", "11" + "0" * (length - 2)]), size
        x = torch.randn(B, length, H * D)
        torch.testing.assert_close(step(compiled, x, *given), step(model, x, *given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [6, pytest.param(7, marks=pytest.mark.slow)])
def test_a_window_that_ends_beyond_the_first_batches_is_heeded_in_later_ones(size):

    def model(x, attention_mask):
        return attend(x, attention_mask, window(attention_mask, size))

    compiled = torch.compile(model, backend="packc", options=STRICT, dynamic=True)
    for length in (4, 20):
        x, mask = (
            torch.randn(B, length, H * D),
            masks(["1" * length, "1" * (length - 1) + "0", "11" + "0" * (length - 2)]),
        )
        with torch._dynamo.config.patch(error_on_recompile=length > 4):
            torch.testing.assert_close(step(compiled, x, mask), step(model, x, mask), rtol=1e-4, atol=1e-5)


def test_a_mask_too_large_to_be_tried_is_looked_at_again_in_longer_batches(monkeypatch):
    monkeypatch.setattr(sys.modules["packc.passes.attention_masks"], "_LARGEST_BEYOND", 2 * 8**2)

    def model(x, attention_mask):
        return attend(x, attention_mask, window(attention_mask, 12))

    compiled = torch.compile(model, backend="packc", options=STRICT, dynamic=True)
    for length in (4, 8, 20):
        x, mask = (
            torch.randn(B, length, H * D),
            masks(["1" * length, "1" * (length - 1) + "0", "11" + "0" * (length - 2)]),
        )
        with torch._dynamo.config.patch(error_on_recompile=length == 8):
            torch.testing.assert_close(step(compiled, x, mask), step(model, x, mask), rtol=1e-4, atol=1e-5)


def test_a_label_before_a_rows_first_token_keeps_the_row_whole():

    def model(x, attention_mask, labels):
        logits = attend(x, attention_mask, also_seen_by_padding(attention_mask))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    x, mask = torch.randn(B, L, H * D), masks(LEFT)
    labels = torch.randint(0, H * D, (B, L)).masked_fill(mask == 0, -100)
    compiled = torch.compile(model, backend="packc", options={**STRICT, "packc.strict": False})
    with pytest.warns(UserWarning, match="2 of 3 rows padded: the position before a row"):
        actual = compiled(x, mask, labels)
    torch.testing.assert_close(actual, model(x, mask, labels))
