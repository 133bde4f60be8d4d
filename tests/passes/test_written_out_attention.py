"""Attention written out in products and a softmax is attention, and nothing that only looks like it is."""

import pytest
import torch
from harness import BOTH, RIGHT, RecordingBackend, batch_of, exact_step, masks, shaken, train_step
from torch.nn import functional as F

import packc

B, L, H, D = 3, 8, 2, 4
ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
PACKED = torch.ops.packc.varlen_attention.default


def scores(q, mask):
    return q @ q.cos().transpose(2, 3) * D**-0.5 + mask


WRITTEN = {
    "plainly": lambda q, mask: scores(q, mask).softmax(-1) @ q,
    "over a root": lambda q, mask: ((q @ q.transpose(-1, -2)) / D**0.5 + mask).softmax(3) @ q,
    "without a scale": lambda q, mask: (q @ q.mT + mask).softmax(-1) @ q,
    "with casts": lambda q, mask: scores(q, mask).softmax(-1, dtype=torch.float32).to(q.dtype) @ q,
    "without its dropout": lambda q, mask: F.dropout(scores(q, mask).softmax(-1), 0.5, training=False) @ q,
    "on other keys": lambda q, mask: scores(q, mask).softmax(-1) @ q[..., :3],
}
NOT = {
    "a mask that is scaled": lambda q, mask: ((q @ q.mT + mask) * 2).softmax(-1) @ q,
    "rounded": lambda q, mask: ((q @ q.mT).int().float() + mask).softmax(-1) @ q,
    "a mask that is taken back": lambda q, mask: (scores(q, -mask) + mask).softmax(-1) @ q,
    "over queries": lambda q, mask: scores(q, mask).softmax(-2) @ q,
    "read by others": lambda q, mask: (lambda p: p @ q + p.amax(-1, True))(scores(q, mask).softmax(-1)),
    "the other way round": lambda q, mask: q.mT @ scores(q, mask).softmax(-1),
}


def model_of(attend):
    def model(x, attention_mask):
        places = torch.arange(x.shape[1])
        visible = (places <= places[:, None]) & (attention_mask[:, None, None] != 0)
        mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
        out = attend(x.unflatten(-1, (H, D)).transpose(1, 2), mask)
        return torch.tanh(out).sum((1, 3)) if out.shape[2] == L else out

    return model


def compiled(model):
    torch._dynamo.reset()
    backend = RecordingBackend()
    return torch.compile(model, backend=backend), backend


@pytest.mark.parametrize("name", WRITTEN)
def test_it_is_packed(name):
    model = model_of(WRITTEN[name])
    call, backend = compiled(model)
    for rows in (RIGHT, BOTH):
        x, mask = torch.randn(B, L, H * D), masks(rows)
        torch.testing.assert_close(call(x, mask)[mask.bool()], model(x, mask)[mask.bool()], rtol=1e-4, atol=1e-5)
    assert backend.op_count(PACKED) == 1


@pytest.mark.parametrize("name", NOT)
def test_what_only_looks_like_it_is_left_alone(name):
    model = model_of(NOT[name])
    call, backend = compiled(model)
    x, mask = torch.randn(B, L, H * D), masks(BOTH)
    torch.testing.assert_close(call(x, mask), model(x, mask), equal_nan=True)
    assert backend.reasons
    assert ATTENTION not in {node.target for node in backend.before[-1].graph.nodes}


def test_a_mask_that_is_added_twice_hides_as_much_and_stays_as_it_is_written():
    model = model_of(lambda q, mask: (scores(q, mask) + mask).softmax(-1) @ q)
    call, backend = compiled(model)
    x, mask = torch.randn(B, L, H * D), masks(BOTH)
    torch.testing.assert_close(call(x, mask)[mask.bool()], model(x, mask)[mask.bool()])
    assert backend.op_count(ATTENTION) == backend.op_count(PACKED) == 0


def test_truths_that_are_added_hide_nothing():
    def model(x, attention_mask):
        q = x.unflatten(-1, (H, D)).transpose(1, 2)
        added = (q @ q.mT + (attention_mask[:, None, None] != 0)).softmax(-1) @ q
        return added, (x * attention_mask[..., None]).sum()

    call, backend = compiled(model)
    x, mask = torch.randn(B, L, H * D), masks(BOTH)
    torch.testing.assert_close(call(x, mask), model(x, mask))
    assert "not seen to hide padding" in backend.reasons[0]


def error(results, exact):
    return max(
        ((results[name].double() - value).abs().max() / value.abs().max()).item()
        for name, value in exact.items()
        if name != "logits"
    )


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_a_decoder_with_eager_attention_packs(dtype):
    import transformers

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = transformers.LlamaConfig(**sizes, **heads, attn_implementation="eager")
    model = shaken(transformers.LlamaForCausalLM(config)).train().to(dtype)
    call = torch.compile(model, backend="packc", options={"packc.inner": "aot_eager", "packc.strict": True})
    batch = batch_of(RIGHT)
    exact, actual, stock = exact_step(model, batch), train_step(call, batch), train_step(model, batch)
    assert error(actual, exact) <= max(1e-5, 2 * error(stock, exact))
    report = packc.explain(model)(**batch, use_cache=False)
    assert [mixer.packed for mixer in report.mixers] == [True] * 2
