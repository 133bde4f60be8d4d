"""Models that attend by FlexAttention give packc one graph, in which attention packs as it does written otherwise."""

import pytest
import torch
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, create_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    masking_utils,
)

import packc
from packc.frontends import hf_flex_attention

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "pad_token_id": 0} | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "use_cache": False,
}
STRICT = {"packc.inner": "aot_eager", "packc.strict": True}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, sliding_window=5, layer_types=["sliding_attention", "full_attention"])
    ),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, sliding_window=5, attn_logit_softcapping=0.2)),
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1, sliding_window=5, eos_token_id=None)
    ),
}
OTHERWISE = {"gemma2": "eager", "gpt_oss": "eager"}


def batch(lengths, L):
    mask = (torch.arange(L) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(1, 32, mask.shape) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def step(call, model, inputs):
    model.zero_grad()
    loss = call(**inputs).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def slow(name):
    return pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", ["gemma3", *map(slow, ("llama", "gemma2", "gpt_oss"))])
def test_a_model_packs_whole_at_every_length(name):
    model = MODELS[name]()
    if name in OTHERWISE:
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(4)  # so that scores are of the size of a cap
    compiled = torch.compile(model, backend="packc", options=STRICT)
    for turn, (lengths, L) in enumerate(
        [([12, 7, 3], 12), ([9, 14, 2, 6], 14), ([20, 20], 20)]
    ):  # at last without padding
        inputs = batch(lengths, L)
        model.set_attn_implementation(OTHERWISE.get(name, "sdpa"))
        expected = step(model, model, inputs)
        model.set_attn_implementation("flex_attention")
        with torch._dynamo.config.patch(error_on_recompile=turn > 1):
            actual = step(compiled, model, inputs)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    report = packc.explain(model)(**batch([20, 11], 20))
    assert (report.graphs, report.tokens) == (1, 31)
    assert [mixer.packed for mixer in report.mixers] == [True, True]
    assert not report.boundaries


# ---- the mask --------------------------------------------------------------------------------------------------------


def test_the_mask_is_one_for_flex_attention():
    batch, L = 2, 150
    padding = torch.arange(L) < torch.tensor([[150], [40]])
    mask = hf_flex_attention.flex_attention_mask(
        batch, L, L, mask_function=masking_utils.sliding_window_causal_mask_function(9), attention_mask=padding
    )
    places = torch.arange(L)
    distance = places[:, None] - places
    seen = (distance >= 0) & (distance < 9) & padding[:, None, None]
    assert torch.equal(create_mask(mask.mask_mod, batch, None, L, L, device="cpu"), seen)
    q, k, v = torch.randn(3, batch, 4, L, 16)
    actual = flex_attention(q, k, v, block_mask=mask)
    real = seen.any(-1, keepdim=True).expand_as(actual)
    torch.testing.assert_close(actual[real], scaled_dot_product_attention(q, k, v, seen)[real])


def attend(mask, **others):
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    return hf_flex_attention.flex_attention_forward(None, q, k, k, mask, **others)


def test_what_is_not_known_is_left_to_the_original():
    causal = masking_utils.causal_mask_function
    make = hf_flex_attention.flex_attention_mask
    mask = make(2, 6, 6, mask_function=causal)
    assert attend(mask)[0].shape == (2, 6, 4, 8)
    for others in ({"position_bias": torch.zeros(1, 4, 6, 6)}, {"dropout": 0.1}, {"kernel_options": {}}):
        assert attend(mask, **others) is NotImplemented
    assert attend(mask, output_attentions=True) is NotImplemented
    assert attend(create_block_mask(lambda b, h, q, k: q >= k, 2, None, 6, 6, device="cpu")) is NotImplemented
    assert attend(torch.zeros(2, 1, 6, 6)) is NotImplemented
    assert make(2, 6, 6, mask_function=causal, use_vmap=True) is NotImplemented


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 2.0, 0.0])])
def test_capped_scores_and_sinks_are_those_of_flex_attention(softcap, sinks):
    """Of left padding too, which sees nothing. Sinks are applied by the logsumexp, as transformers does on CUDA."""
    padding = torch.arange(6) >= torch.tensor([[0], [2]])
    mask = hf_flex_attention.flex_attention_mask(
        2, 6, 6, mask_function=masking_utils.causal_mask_function, attention_mask=padding
    )
    q, k, v = torch.randn(2, 4, 6, 8, dtype=torch.float64), *torch.randn(2, 2, 2, 6, 8, dtype=torch.float64)

    def capped(score, b, h, i, j):
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    aux = AuxRequest(lse=True)
    expected, of_keys = flex_attention(q, k, v, capped, mask, enable_gqa=True, return_aux=aux)
    if sinks is not None:
        lse = of_keys.lse.double()[..., None]
        expected = expected * (lse - torch.logaddexp(lse, sinks.view(1, -1, 1, 1))).exp()
    found, _ = hf_flex_attention.flex_attention_forward(None, q, k, v, mask, softcap=softcap, s_aux=sinks)
    torch.testing.assert_close(found.transpose(1, 2), expected.double(), rtol=1e-6, atol=1e-7)
    assert not found[1, :2].any()
