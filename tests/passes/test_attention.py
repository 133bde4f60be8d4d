"""Attention is packed where its mask is of a known form, and runs padded where it hides padding in another way."""

import sys

import pytest
import torch
from harness import BOTH, HOLE, LEFT, RIGHT, RecordingBackend, masks
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import packc
from packc.ops.varlen_attention import dropout
from packc.passes.graph import Tokens
from packc.passes.reading import NotTokenwise, Reading
from packc.passes.rules.attention import _HEADS_FIRST, varlen_attention
from packc.passes.rules.registry import Op
from packc.passes.visible import Band

B, L, H, D = 3, 8, 2, 4
TAPS = torch.randn(H * D, 3, generator=torch.Generator().manual_seed(1))
WEIGHT = torch.randn(H * D, H * D, generator=torch.Generator().manual_seed(3))
STRICT = {"packc.inner": "aot_eager", "packc.strict": True}
CONV, ATTENTION = "packc.causal_conv1d.default", "aten.scaled_dot_product_attention.default"
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


def window(m, size):
    places = torch.arange(m.shape[1])
    return causal(m) & (places > places[:, None] - size)


PACKED = {
    "causal": causal,
    "additive": additive,
    "of keys": lambda m: m[:, None, None] != 0,
    "of keys, additive": lambda m: (1.0 - m[:, None, None].float()) * -1e9,
    "a window": lambda m: window(m, 3),
    "a window by a triangle": lambda m: causal(m) & ~causal(m).tril(-3),
    "a window beyond the batch": lambda m: window(m, 100),
    "a window on both sides": lambda m: (window(m, 3) | window(m, 3).mT) & (m[:, None, None] != 0),
    "of one document": lambda m: causal(m) & (m[:, None, None] == m[:, None, :, None]),
    "open to padding's own queries": also_seen_by_padding,
}
HIDING = {
    **PACKED,
    "causal by an input": lambda m: CAUSAL & (m[:, None, None] != 0),
    "biased": lambda m: additive(m) + TAPS[0, 0],
    "chunked": lambda m: causal(m) & (torch.arange(m.shape[1]) // 4 == (torch.arange(m.shape[1]) // 4)[:, None]),
    "all but itself": lambda m: (m[:, None, None] != 0) & ~torch.eye(m.shape[1], dtype=torch.bool),
    "a head's own": lambda m: torch.cat([window(m, 2), window(m, 3)], 1),
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
    assert report.tokens == 15
    assert [mixer.op for mixer in report.mixers if mixer.packed] == [CONV, ATTENTION][: 1 + (name in PACKED)]
    assert [boundary.node for boundary in report.boundaries] == [ATTENTION][name in PACKED :]


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
    torch._dynamo.reset()

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


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_bias_of_each_query_leaves_the_rest_packed(dynamic):
    torch._dynamo.reset()

    def model(x, attention_mask, weight):
        return biased(x, attention_mask, weight, lambda h, distances: (h / 2).gather(3, distances))

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
        lambda h, distances: h.gather(3, distances).mT,
        lambda h, distances: h.cumsum(2).gather(3, distances),
        lambda h, distances: h.gather(3, distances) - h.gather(3, distances).amax(2, keepdim=True),
        lambda h, distances: h.gather(3, distances).flip(2),
    ],
    ids=["each key", "queries before", "all queries", "another query"],
)
def test_a_bias_of_other_tokens_does_not(bias):
    def model(x, attention_mask, weight):
        return biased(x, attention_mask, weight, bias)

    given = torch.randn(B, L, H * D), masks(RIGHT), torch.nn.Parameter(WEIGHT)
    assert "is not zero at padding" in reason_of(model, *given)


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


def test_attention_to_another_sequence_of_the_same_size_is_between_two_that_are_packed():
    def model(x, attention_mask, y, y_attention_mask):
        x = packc.ops.causal_conv1d(x * attention_mask[..., None], TAPS)
        y = packc.ops.causal_conv1d(y * y_attention_mask[..., None], TAPS)
        mixed = F.scaled_dot_product_attention(
            heads(x), heads(y), heads(y), attn_mask=y_attention_mask[:, None, None] != 0
        )
        return x + mixed.transpose(1, 2).flatten(2), y

    x, y = torch.randn(2, B, L, H * D)
    given = x, masks(RIGHT), y, masks(LEFT)
    compiled = torch.compile(model, backend="packc", options={"packc.inner": "aot_eager"})
    for got, want, mask in zip(compiled(*given), model(*given), given[1::2], strict=True):
        torch.testing.assert_close(got[mask == 1], want[mask == 1], rtol=1e-4, atol=1e-5)
    assert [stream.tokens for stream in packc.explain(model)(*given).streams] == [15, 15]


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


def test_a_window_that_the_graph_is_given_is_heeded_when_it_changes():
    torch._dynamo.reset()

    def model(x, attention_mask, size):
        return attend(x, attention_mask, window(attention_mask, size))

    compiled = torch.compile(model, backend="packc", options=STRICT, dynamic=True)
    for length, size in ((4, 7), (20, 7), (20, 3)):
        given = masks(["1" * length, "1" * (length - 1) + "0", "11" + "0" * (length - 2)]), size
        x = torch.randn(B, length, H * D)
        torch.testing.assert_close(step(compiled, x, *given), step(model, x, *given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [6, pytest.param(7, marks=pytest.mark.slow)])
def test_a_window_that_ends_beyond_the_first_batches_is_heeded_in_later_ones(size):
    torch._dynamo.reset()

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
    torch._dynamo.reset()
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


def test_without_the_pass_it_runs_padded():
    def model(x, attention_mask):
        return attend(x, attention_mask, causal(attention_mask))

    skipping = packc.explain(model, options={"packc.skip_passes": "pack_attention"})
    report = skipping(torch.randn(B, L, H * D), masks(RIGHT))
    assert ([m.op for m in report.mixers], [b.node for b in report.boundaries]) == ([CONV], [ATTENTION])


@pytest.mark.parametrize("rows", [RIGHT, LEFT])
def test_a_nan_stays_in_its_document(rows):
    torch._dynamo.reset()

    def model(x, attention_mask):
        return attend(x, attention_mask, causal(attention_mask))

    compiled = torch.compile(model, backend="packc", options=STRICT)
    x, mask = torch.randn(B, L, H * D), masks(rows)
    x[1, mask[1].nonzero()[1]] = torch.nan
    out = compiled(x, mask)
    assert out[[0, 2]].isfinite().all()
    assert out[1].isnan().any()


@pytest.mark.parametrize("options", [{"scale": 0.3}, {"dropout_p": 0.0, "enable_gqa": True}])
def test_options_of_attention(options):
    torch._dynamo.reset()

    def model(x, attention_mask):
        return attend(x, attention_mask, causal(attention_mask), **options)

    x, mask = torch.randn(B, L, H * D), masks(RIGHT)
    report = packc.explain(model)(x, mask)
    assert [m.op for m in report.mixers] == [CONV, ATTENTION]
    compiled = torch.compile(model, backend="packc", options=STRICT)
    torch.testing.assert_close(step(compiled, x, mask), step(model, x, mask), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [RIGHT, LEFT])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_dropout_drops_what_a_seed_of_torchs_generator_says(rows, checkpointed):
    torch._dynamo.reset()
    mask = masks(rows)

    def model(x, attention_mask):
        def attention(x):
            return attend(x, attention_mask, causal(attention_mask), dropout_p=0.5)

        return checkpoint(attention, x, use_reentrant=False) if checkpointed else attention(x)

    def written_out(x, attention_mask):
        x = packc.ops.causal_conv1d(x * attention_mask[..., None], TAPS, activation="silu")
        scores = heads(x) @ heads(x.cos()).mT * D**-0.5
        mixed = torch.zeros(B, H, L, D)
        for row, real in enumerate(attention_mask.bool()):
            n = int(real.sum())
            seen = scores[row][:, real][:, :, real].masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf)
            weights = seen.softmax(-1) * dropout.factors(seed, row, H, n, 0.5, x)
            mixed[row, :, real] = weights @ heads(x.sin())[row][:, real]
        return F.layer_norm(x + mixed.transpose(1, 2).flatten(2), (H * D,))

    x = torch.randn(B, L, H * D)
    compiled = torch.compile(model, backend="packc", options=STRICT)
    for _ in range(2):
        state = torch.get_rng_state()
        actual = step(compiled, x, mask)
        torch.set_rng_state(state)
        seed = dropout.draw_seed()
        torch.testing.assert_close(actual, step(written_out, x, mask), rtol=1e-4, atol=1e-5)
    assert [m.op for m in packc.explain(model)(x, mask).mixers if m.packed] == [CONV, ATTENTION]


def test_dropout_on_another_device_runs_padded():
    graph = torch.fx.Graph()
    q = graph.placeholder("q")
    node = graph.call_function(torch.ops.aten.scaled_dot_product_attention.default, (q, q, q, None, 0.5))
    with FakeTensorMode():
        node.meta["val"] = q.meta["val"] = torch.empty(B, H, L, D, device="cuda")
    padded = Reading(_HEADS_FIRST, dict.fromkeys([q], _HEADS_FIRST), padded="is not packed")
    with pytest.raises(NotTokenwise, match="attention with dropout runs padded on cuda"):
        varlen_attention(Op(node, Tokens(), B, L), Band(causal=True), padded)


def test_grouped_heads_and_heads_of_two_widths():
    torch._dynamo.reset()

    def model(x, attention_mask):
        x = packc.ops.causal_conv1d(x * attention_mask[..., None], TAPS)
        q, k = heads(x), heads(x)[:, :1]
        mixed = F.scaled_dot_product_attention(q, k, k[..., :3], causal(attention_mask), enable_gqa=True)
        return mixed.transpose(1, 2).flatten(2)

    x, mask = torch.randn(B, L, H * D), masks(RIGHT)
    compiled = torch.compile(model, backend="packc", options=STRICT)
    torch.testing.assert_close(step(compiled, x, mask), step(model, x, mask), rtol=1e-4, atol=1e-5)
    assert [m.op for m in packc.explain(model)(x, mask).mixers] == [CONV, ATTENTION]


def test_autocast_casts_for_packed_attention_too():
    torch._dynamo.reset()

    def model(x, attention_mask):
        with torch.autocast("cpu", torch.bfloat16):
            return attend(x, attention_mask, causal(attention_mask))

    x, mask = torch.randn(B, L, H * D), masks(RIGHT)
    actual, expected = torch.compile(model, backend="packc", options=STRICT)(x, mask), model(x, mask)
    real = mask.bool()
    torch.testing.assert_close(actual[real], expected[real], rtol=2e-2, atol=2e-2)
    assert [m.op for m in packc.explain(model)(x, mask).mixers] == [CONV, ATTENTION]


def test_operands_that_autocast_leaves_in_two_dtypes_pack():
    """Queries and keys are turned in fp32, values come from a linear layer, and a new cache is joined on."""
    torch._dynamo.reset()
    weight, turn = torch.randn(H * D, H * D) / 4, torch.randn(L, 1).cos()

    def model(x, attention_mask):
        with torch.autocast("cpu", torch.bfloat16):
            x = packc.ops.causal_conv1d(x * attention_mask[..., None], TAPS)
            q, v = F.linear(x, weight), F.linear(x, weight)
            v = torch.cat([torch.tensor([], dtype=v.dtype), heads(v)], -2)
            q = heads(q * turn)
            return F.scaled_dot_product_attention(q, q, v, attn_mask=causal(attention_mask)).transpose(1, 2).flatten(2)

    x, mask = torch.randn(B, L, H * D), masks(RIGHT)
    actual, expected = torch.compile(model, backend="packc", options=STRICT)(x, mask), model(x, mask)
    real = mask.bool()
    torch.testing.assert_close(actual[real], expected[real], rtol=2e-2, atol=2e-2)
    assert actual.dtype == expected.dtype == torch.bfloat16
