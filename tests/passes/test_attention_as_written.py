"""Attention that is written out, and more than the fused op: packed where ``varlen_attention`` computes the same, else
as it is written, with the rest of its graph packed."""

import pytest
import torch
import transformers
from harness import BOTH, LEFT, RIGHT, RecordingBackend, assert_same_step, batch_of, masks, shaken, train_step

import packc
from packc.passes.attention_as_written import AsWritten

PACKED = torch.ops.packc.varlen_attention.default

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


def near(q, mask):
    return mask.masked_fill(distances(q) > 2, torch.finfo(mask.dtype).min)


def strange(q, mask):
    return mask.masked_fill(distances(q) == 2, torch.finfo(mask.dtype).min)


def biases(q):
    """Of each query, by how far away a key is."""
    back = distances(q)
    return q.gather(-1, back.clamp(0, D - 1).expand(*q.shape[:2], -1, -1)).masked_fill(back > 2, 0)


def shares(q, mask, own):
    return torch.cat([scores(q) + mask, own], -1)


PACKS = {
    "capped": lambda q, mask: ((scores(q) / 2).tanh() * 2 + mask).softmax(-1) @ q,
    "capped, other numbers": lambda q, mask: ((scores(q) * 3).tanh() / 0.5 + mask).softmax(-1) @ q,
    "scaled alone, and given a column": lambda q, mask: shares(q, mask, sinks(q)).softmax(-1)[..., :-1] @ q,
    "with sinks, from the largest score": (
        lambda q, mask: less_largest(shares(q, mask, sinks(q))).softmax(-1)[..., :-1] @ q
    ),
    "both": lambda q, mask: torch.cat([scores(q).tanh() + mask, sinks(q)], -1).softmax(-1)[..., : q.shape[2]] @ q,
    "both, of each token": (
        lambda q, mask: torch.cat([scores(q).tanh() + mask, q[..., 1:2].sin()], -1).softmax(-1)[..., :-1] @ q
    ),
    "both, over a window": (
        lambda q, mask: torch.cat([scores(q).tanh() + near(q, mask), sinks(q)], -1).softmax(-1)[..., :-1] @ q
    ),
}
AS_WRITTEN = {
    "capped, in fp64": lambda q, mask: (scores(q).tanh() + mask).softmax(3, dtype=torch.float64).to(q.dtype) @ q,
    "capped twice": lambda q, mask: (scores(q).tanh().tanh() + mask).softmax(-1) @ q,
    "capped the other way round": lambda q, mask: (scores(q).tanh() * -2 + mask).softmax(-1) @ q,
    "with two sinks": lambda q, mask: shares(q, mask, SINKS.expand(B, -1, L, 2)).softmax(-1)[..., :-2] @ q,
    "with sinks of each position": (
        lambda q, mask: shares(q, mask, (sinks(q) * torch.arange(L).view(L, 1))).softmax(-1)[..., :-1] @ q
    ),
    "capped, by a mask of its own": lambda q, mask: (scores(q).tanh() + strange(q, mask)).softmax(-1) @ q,
    "with two sinks of each token": lambda q, mask: shares(q, mask, q[..., :2]).softmax(-1)[..., :-2] @ q,
    "with biases": lambda q, mask: (scores(q) + biases(q) + mask).softmax(-1) @ q,
    "with biases and sinks": (
        lambda q, mask: torch.cat([scores(q) + biases(q) + mask, q[..., :1]], -1).softmax(-1)[..., :-1] @ q
    ),
    "with biases of positions": lambda q, mask: (scores(q) + distances(q).cos()[None, None] + mask).softmax(-1) @ q,
}
NOT = {
    "capped and rounded": lambda q, mask: ((scores(q).tanh() * 9).int().float() + mask).softmax(-1) @ q,
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


def compared_with_stock(model, atol):
    torch._dynamo.reset()
    call = torch.compile(model, backend="packc", options=STRICT)
    for rows in (RIGHT, LEFT, BOTH):
        x, mask = torch.randn(B, L, H * D), masks(rows)
        torch.testing.assert_close(step(call, x, mask), step(model, x, mask), rtol=1e-5, atol=atol)
    return packc.explain(model)(x, mask)


@pytest.mark.parametrize(
    "name",
    [
        "capped",
        "both, of each token",
        "both, over a window",
        *(slow(name) for name in PACKS if name not in ("capped", "both, of each token", "both, over a window")),
    ],
)
def test_what_varlen_attention_computes_packs(name):
    report = compared_with_stock(model_of(PACKS[name]), 1e-5)
    assert not report.boundaries
    assert [(each.op, each.packed) for each in report.mixers if each.op == AsWritten.name] == [(AsWritten.name, True)]


FEW = (
    "capped, in fp64",
    "with two sinks",
    "with sinks of each position",
    "with two sinks of each token",
    "with biases and sinks",
)


@pytest.mark.parametrize("name", [each if each in FEW else slow(each) for each in AS_WRITTEN])
def test_what_works_token_by_token_packs_around_what_it_does_not(name):
    report = compared_with_stock(model_of(AS_WRITTEN[name]), 1e-6)
    looks_up_biases = {"aten.gather.default"} if "biases" in name and "positions" not in name else set()
    assert {each.node for each in report.boundaries} == {AsWritten.name, *looks_up_biases}


@pytest.mark.parametrize("attend", [AS_WRITTEN["with biases and sinks"], PACKS["both"]], ids=["as written", "packed"])
def test_padding_and_other_rows_never_reach_it(attend):
    torch._dynamo.reset()
    call = torch.compile(model_of(attend), backend="packc", options=STRICT)
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


@pytest.mark.parametrize("name", ["both", "both, of each token"])
def test_several_documents_in_a_row_are_kept_apart_where_it_packs(name):
    torch._dynamo.reset()
    model = model_of(PACKS[name])
    call = torch.compile(model, backend="packc", options=STRICT)
    x, mask = torch.randn(1, L, H * D), torch.ones(1, L, dtype=torch.int64)
    mask[0, 7:] = 0
    with packc.documents(cu_seqlens=torch.tensor([0, 3, 7, L])):
        out, grad = step(call, x, mask)
        changed = x.clone()
        changed[:, :3] = torch.nan
        of_others, _ = step(call, changed, mask)
    for first, end in ((0, 3), (3, 7)):
        alone, of_alone = step(model, x[:, first:end], mask[:, first:end])
        weight = torch.randn(7, H * D, generator=torch.Generator().manual_seed(2))
        leaf = x[:, first:end].clone().requires_grad_()
        of_alone = torch.autograd.grad((model(leaf, mask[:, first:end])[0] * weight[first:end]).sum(), leaf)[0]
        torch.testing.assert_close(out[first:end], alone)
        torch.testing.assert_close(grad[:, first:end], of_alone)
    assert torch.equal(of_others[3:], out[3:])
    assert of_others[:3].isnan().all()


def test_several_documents_in_a_row_are_refused_where_it_does_not():
    torch._dynamo.reset()
    model = model_of(AS_WRITTEN["capped, by a mask of its own"])
    call = torch.compile(model, backend="packc", options={"packc.inner": "aot_eager"})
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


@pytest.mark.parametrize("rows", [RIGHT, slow(LEFT)], ids=["right", "left"])
@pytest.mark.parametrize("name", ["sinks", slow("capped scores")])
def test_models_of_transformers_pack(name, rows):
    torch._dynamo.reset()
    model = shaken(MODELS[name]()).train()
    batch = batch_of(rows)
    # On the left a row's first token is predicted where attention sees padding.
    batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"].cumsum(1) == 1, -100)
    stock = train_step(model, batch)  # whose softmax is fp32's whatever the model is
    packed = train_step(torch.compile(model, backend="packc", options=STRICT), batch)
    assert_same_step(packed, stock, batch["attention_mask"])
    report = packc.explain(model)(**batch, use_cache=False)
    assert not report.boundaries
    assert [mixer.packed for mixer in report.mixers] == [True] * 2


def test_what_is_computed_wider_than_the_result_is_computed_so_packed():
    """Scores in fp32 of a model in bf16: what is rounded is what stock rounds."""
    torch._dynamo.reset()

    def attend(q, mask):
        wide = q.float() if q.dtype == torch.bfloat16 else q
        return ((wide @ wide.cos().transpose(2, 3)).tanh() + mask).softmax(-1).to(q.dtype) @ q

    def model(x, attention_mask):
        places = torch.arange(x.shape[1])
        visible = (places <= places[:, None]) & (attention_mask[:, None, None] != 0)
        mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
        heads = (x * attention_mask[..., None].to(x.dtype)).unflatten(-1, (H, D)).transpose(1, 2)
        return attend(heads, mask).transpose(1, 2).flatten(2)

    backend = RecordingBackend()
    call = torch.compile(model, backend=backend)
    x, mask = torch.randn(B, L, H * D).bfloat16() * 3, masks(RIGHT)
    real = mask.bool()
    with torch.no_grad():
        out, stock, exact = call(x, mask)[real], model(x, mask)[real], model(x.double(), mask)[real]
    assert backend.op_count(PACKED) == 1
    assert out.dtype == torch.bfloat16
    assert (out - exact).abs().max() <= (stock - exact).abs().max()


def test_another_models_scale_changes_nothing():
    torch._dynamo.reset()
    for heads in (1, 2):
        config = transformers.LlamaConfig(**SIZES, **{**HEADS, "num_attention_heads": heads, "head_dim": 16 // heads})
        report = packc.explain(transformers.LlamaForCausalLM(config))(**batch_of(RIGHT), use_cache=False)
        assert [mixer.packed for mixer in report.mixers] == [True] * 2
