"""Attention that packs is stock's on each document, with all its options; which masks do: test_attention_masks.py."""

import pytest
import torch
from harness import HOLE, LEFT, RIGHT, masks
from masked_attention import ATTENTION, CONV, STRICT, TAPS, B, D, H, L, attend, causal, heads, reason_of, step
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


def test_rows_that_stay_whole_attend_as_stock_does():

    def model(x, attention_mask):
        return attend(x, attention_mask, causal(attention_mask))

    compiled = torch.compile(model, backend="packc", options={**STRICT, "packc.strict": False})
    x = torch.randn(B, L, H * D)
    with pytest.warns(UserWarning, match="1 of 3 rows padded: padding between"):
        actual = step(compiled, x, masks(HOLE))
    torch.testing.assert_close(actual, step(model, x, masks(HOLE)), rtol=1e-4, atol=1e-5)


def test_causal_attention_without_a_mask_keeps_left_padding():

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


def test_without_the_pass_it_runs_padded():
    def model(x, attention_mask):
        return attend(x, attention_mask, causal(attention_mask))

    skipping = packc.explain(model, options={"packc.skip_passes": "pack_attention"})
    report = skipping(torch.randn(B, L, H * D), masks(RIGHT))
    assert ([m.op for m in report.mixers], [b.node for b in report.boundaries]) == ([CONV], [ATTENTION])


@pytest.mark.parametrize("rows", [RIGHT, LEFT])
def test_a_nan_stays_in_its_document(rows):

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

    def model(x, attention_mask):
        return attend(x, attention_mask, causal(attention_mask), **options)

    x, mask = torch.randn(B, L, H * D), masks(RIGHT)
    report = packc.explain(model)(x, mask)
    assert [m.op for m in report.mixers] == [CONV, ATTENTION]
    compiled = torch.compile(model, backend="packc", options=STRICT)
    torch.testing.assert_close(step(compiled, x, mask), step(model, x, mask), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "checkpointed"),
    [
        (RIGHT, False),
        (LEFT, True),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in ((RIGHT, True), (LEFT, False))),
    ],
)
def test_dropout_drops_what_a_seed_of_torchs_generator_says(rows, checkpointed):
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


@pytest.mark.parametrize("options", [{"enable_gqa": True}, {}])
def test_grouped_heads_and_heads_of_two_widths(options):
    """One head of keys is every query's, whether or not heads are said to be grouped."""

    def model(x, attention_mask):
        x = packc.ops.causal_conv1d(x * attention_mask[..., None], TAPS)
        q, k = heads(x), heads(x)[:, :1]
        mixed = F.scaled_dot_product_attention(q, k, k[..., :3], causal(attention_mask), **options)
        return mixed.transpose(1, 2).flatten(2)

    x, mask = torch.randn(B, L, H * D), masks(RIGHT)
    compiled = torch.compile(model, backend="packc", options=STRICT)
    torch.testing.assert_close(step(compiled, x, mask), step(model, x, mask), rtol=1e-4, atol=1e-5)
    assert [m.op for m in packc.explain(model)(x, mask).mixers] == [CONV, ATTENTION]


def test_autocast_casts_for_packed_attention_too():

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
