"""Attention that is written out, and more than the fused op, runs as it is written; the rest of its graph packs."""

import pytest
import torch
import transformers
from harness import BOTH, LEFT, RIGHT, RecordingBackend, assert_same_step, batch_of, masks, shaken, train_step

import packc
from packc.passes.attention_as_written import AsWritten

B, L, H, D = 3, 8, 2, 4
STRICT = {"packc.inner": "aot_eager", "packc.strict": True}
WEIGHT = torch.randn(H * D, H * D, generator=torch.Generator().manual_seed(1))
TAPS = torch.randn(H * D, 3, generator=torch.Generator().manual_seed(1))
SINKS = torch.tensor([0.5, -1.0]).view(1, H, 1, 1)


def slow(name):
    return pytest.param(name, marks=pytest.mark.slow)


def scores(q):
    return q @ q.cos().transpose(2, 3) * D**-0.5


def sinks(q):
    return SINKS.expand(q.shape[0], -1, q.shape[2], -1)


def less_largest(x):
    return x - x.max(-1, keepdim=True).values


def distances(q):
    places = torch.arange(q.shape[2])
    return places[:, None] - places


def biases(q):
    """Of each query, by how far away a key is."""
    back = distances(q)
    return q.gather(-1, back.clamp(0, D - 1).expand(*q.shape[:2], -1, -1)).masked_fill(back > 2, 0)


def shares(q, mask, own):
    return torch.cat([scores(q) + mask, own], -1)


AS_WRITTEN = {
    "capped": lambda q, mask: ((scores(q) / 2).tanh() * 2 + mask).softmax(-1) @ q,
    "capped, with casts": lambda q, mask: (scores(q).tanh() + mask).softmax(3, dtype=torch.float64).to(q.dtype) @ q,
    "with sinks": lambda q, mask: shares(q, mask, sinks(q)).softmax(-1)[..., :-1] @ q,
    "with sinks, from the largest score": (
        lambda q, mask: less_largest(shares(q, mask, sinks(q))).softmax(-1)[..., :-1] @ q
    ),
    "with sinks of each token": lambda q, mask: shares(q, mask, q[..., :2]).softmax(-1)[..., :-2] @ q,
    "with biases": lambda q, mask: (scores(q) + biases(q) + mask).softmax(-1) @ q,
    "with biases and sinks": (
        lambda q, mask: torch.cat([scores(q) + biases(q) + mask, q[..., :1]], -1).softmax(-1)[..., :-1] @ q
    ),
    "with biases of positions": lambda q, mask: (scores(q) + distances(q).cos()[None, None] + mask).softmax(-1) @ q,
    "both": lambda q, mask: torch.cat([scores(q).tanh() + mask, sinks(q)], -1).softmax(-1)[..., : q.shape[2]] @ q,
}
NOT = {
    "a mask that is capped": lambda q, mask: (scores(q) + mask).tanh().softmax(-1) @ q,
    "scores less the largest, padding's too": lambda q, mask: (less_largest(scores(q)).tanh() + mask).softmax(-1) @ q,
    "the sinks instead": lambda q, mask: shares(q, mask, sinks(q)).softmax(-1)[..., 1:] @ q,
    "its scores as sinks": lambda q, mask: (lambda s: torch.cat([s + mask, s], -1))(scores(q)).softmax(-1)[..., :L] @ q,
    "keys as sinks": lambda q, mask: torch.cat([scores(q) + mask, scores(q)], -1).softmax(-1)[..., :L] @ q,
    "truths that are added": lambda q, mask: (scores(q).tanh() + (mask == 0)).softmax(-1) @ q,
    "biases of each key": lambda q, mask: (scores(q) + q.sum(-1)[:, :, None] + mask).softmax(-1) @ q,
    "biases that know other keys": lambda q, mask: (scores(q) + scores(q.cos()) + mask).softmax(-1) @ q,
    "without a mask": lambda q, mask: scores(q).tanh().softmax(-1) @ q,
    "read by others": (lambda q, mask: (lambda p: p @ q + p.amax(-1, True))((scores(q).tanh() + mask).softmax(-1))),
}


def model_of(attend):
    def model(x, attention_mask):
        places = torch.arange(x.shape[1])
        visible = (places <= places[:, None]) & (attention_mask[:, None, None] != 0)
        mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
        mixed = packc.ops.causal_conv1d(x * attention_mask[..., None], TAPS, activation="silu")
        heads = (mixed @ WEIGHT).unflatten(-1, (H, D)).transpose(1, 2)
        return torch.tanh(attend(heads, mask).transpose(1, 2).flatten(2) @ WEIGHT)

    return model


def step(call, x, mask):
    leaf, real = x.clone().requires_grad_(), mask.bool()
    out = call(leaf, mask)[real]
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    return out.detach(), torch.autograd.grad((out * weight).sum(), leaf)[0]


FEW = ("capped", "with sinks, from the largest score", "with sinks of each token", "with biases and sinks")


@pytest.mark.parametrize("name", [each if each in FEW else slow(each) for each in AS_WRITTEN])
def test_what_works_token_by_token_packs_around_it(name):
    torch._dynamo.reset()
    model = model_of(AS_WRITTEN[name])
    call = torch.compile(model, backend="packc", options=STRICT)
    for rows in (RIGHT, LEFT, BOTH):
        x, mask = torch.randn(B, L, H * D), masks(rows)
        torch.testing.assert_close(step(call, x, mask), step(model, x, mask), rtol=1e-5, atol=1e-6)
    report = packc.explain(model)(x, mask)
    looks_up_biases = {"aten.gather.default"} if "biases" in name and "positions" not in name else set()
    assert {each.node for each in report.boundaries} == {AsWritten.name, *looks_up_biases}


def test_padding_and_other_rows_never_reach_it():
    torch._dynamo.reset()
    call = torch.compile(model_of(AS_WRITTEN["both"]), backend="packc", options=STRICT)
    x, mask = torch.randn(B, L, H * D), masks(RIGHT)
    other = torch.where(mask[..., None].bool(), x, 7.0)
    other[1:] = torch.randn(B - 1, L, H * D)
    for one, another in zip(step(call, x, mask), step(call, other, mask), strict=True):
        first = int(mask[0].sum()) if one.ndim == 2 else slice(0, 1)
        rows = slice(0, first) if one.ndim == 2 else first
        assert torch.equal(one[rows], another[rows])


@pytest.mark.parametrize("name", NOT)
def test_what_only_looks_like_it_is_left_alone(name):
    torch._dynamo.reset()
    backend = RecordingBackend()
    model = model_of(NOT[name])
    call = torch.compile(model, backend=backend)
    x, mask = torch.randn(B, L, H * D), masks(BOTH)
    torch.testing.assert_close(call(x, mask), model(x, mask), equal_nan=True)
    assert backend.reasons


def test_several_documents_in_a_row_are_refused():
    torch._dynamo.reset()
    call = torch.compile(model_of(AS_WRITTEN["capped"]), backend="packc", options={"packc.inner": "aot_eager"})
    x, mask = torch.randn(1, L, H * D), torch.ones(1, L, dtype=torch.int64)
    with pytest.raises(packc.NotPacked, match=AsWritten.name), packc.documents(cu_seqlens=torch.tensor([0, 3, L])):
        call(x, mask)


SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "attn_implementation": "eager"}
MODELS = {
    "sinks": lambda: transformers.GptOssForCausalLM(
        transformers.GptOssConfig(
            **SIZES, **HEADS, num_local_experts=2, num_experts_per_tok=1, pad_token_id=0, eos_token_id=None
        )
    ),
    "capped scores": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**SIZES, **HEADS, attn_logit_softcapping=1.0, sliding_window=4)
    ),
}


@pytest.mark.parametrize("name", ["sinks", slow("capped scores")])
def test_models_of_transformers_pack_around_it(name):
    torch._dynamo.reset()
    model = shaken(MODELS[name]()).train()
    batch = batch_of(RIGHT)
    stock = train_step(model, batch)  # whose softmax is fp32's whatever the model is
    packed = train_step(torch.compile(model, backend="packc", options=STRICT), batch)
    assert_same_step(packed, stock, batch["attention_mask"])
    report = packc.explain(model)(**batch, use_cache=False)
    assert [each.node for each in report.boundaries] == [AsWritten.name] * 2


def test_another_models_scale_changes_nothing():
    torch._dynamo.reset()
    for heads in (1, 2):
        config = transformers.LlamaConfig(**SIZES, **{**HEADS, "num_attention_heads": heads, "head_dim": 16 // heads})
        report = packc.explain(transformers.LlamaForCausalLM(config))(**batch_of(RIGHT), use_cache=False)
        assert [mixer.packed for mixer in report.mixers] == [True] * 2
