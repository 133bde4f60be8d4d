"""Models that attend by FlexAttention give packc one graph, in which attention packs as it does written otherwise."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
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
}


def batch(lengths, L):
    mask = (torch.arange(L) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(1, 32, mask.shape) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def step(call, model, inputs):
    model.zero_grad()
    loss = call(**inputs).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("name", [pytest.param("llama", marks=pytest.mark.slow), "gemma3"])
def test_a_model_packs_whole_at_every_length(name):
    model = MODELS[name]()
    compiled = torch.compile(model, backend="packc", options=STRICT)
    for turn, (lengths, L) in enumerate(
        [([12, 7, 3], 12), ([9, 14, 2, 6], 14), ([20, 20], 20)]
    ):  # at last without padding
        inputs = batch(lengths, L)
        model.set_attn_implementation("sdpa")
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
    for others in ({"softcap": 20.0}, {"s_aux": torch.zeros(4)}, {"dropout": 0.1}, {"kernel_options": {}}):
        assert attend(mask, **others) is NotImplemented
    assert attend(mask, output_attentions=True) is NotImplemented
    assert attend(create_block_mask(lambda b, h, q, k: q >= k, 2, None, 6, 6, device="cpu")) is NotImplemented
    assert attend(torch.zeros(2, 1, 6, 6)) is NotImplemented
    assert make(2, 6, 6, mask_function=causal, use_vmap=True) is NotImplemented
    assert make(2, 6, 6, mask_function=causal, config=SimpleNamespace(attn_logit_softcapping=50.0)) is NotImplemented


@pytest.mark.slow  # transformers compiles what makes the mask
def test_capped_scores_run_padded_as_the_model_has_it():
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES, sliding_window=4, attn_logit_softcapping=2.0)).eval()
    model.set_attn_implementation("eager")
    inputs = batch([12, 7, 3], 12)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**inputs).logits
        model.set_attn_implementation("flex_attention")
        compiled = torch.compile(model, backend="packc", options={"packc.inner": "aot_eager"})
        torch.testing.assert_close(compiled(**inputs).logits[real], expected[real], rtol=1e-4, atol=1e-5)
