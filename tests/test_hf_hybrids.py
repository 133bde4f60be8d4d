"""Stock models with attention pack whole, and the numbers are eager's."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from harness import BOTH, HOLE, LEFT, RIGHT, exact_step, shaken, train_step
from harness import batch_of as batch_with_cache

import packc
from packc.passes.attention_as_written import AsWritten

sys.path.insert(0, str(Path(__file__).parent / "frontends"))
from tiny_models import MIXERS, tiny_model

DEBUG = {"packc.inner": "aot_eager"}
PACKED = ("bamba", "falcon_h1", "nemotron_h", "zamba2")
ATTENTION = "aten.scaled_dot_product_attention.default"
one_family_now_the_others_slow = pytest.mark.parametrize(
    "family", ["bamba", *(pytest.param(family, marks=pytest.mark.slow) for family in PACKED[1:])]
)


def batch_of(rows):
    return {**batch_with_cache(rows), "use_cache": False}


def error(actual, exact, real):
    """The largest of all results, each against its own largest value."""
    results = [
        (actual[name][real], value[real]) if name == "logits" else (actual[name], value)
        for name, value in exact.items()
    ]
    return max(((x.double() - y).abs().max() / y.abs().max()).item() for x, y in results if y.numel())


def assert_as_exact_as_eager(actual, model, batch):
    """Within 1e-5 of fp64, or twice what eager is off, at these weights or, as what large terms leave that cancel is
    close at some by luck, at weights that are off by their last bit (zamba2 divides by small sums)."""
    real = batch["attention_mask"].bool()
    off = error(actual, exact_step(model, batch), real)
    if off > 1e-5:
        weights = [model, *(_off_by_a_bit(model) for _ in range(4))]
        assert off <= 2 * max(error(train_step(each, batch), exact_step(each, batch), real) for each in weights)


def _off_by_a_bit(model):
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for weight in changed.parameters():
            weight.mul_(1 + torch.finfo(weight.dtype).eps * torch.randint(-1, 2, weight.shape))
    return changed


@one_family_now_the_others_slow
def test_a_training_step_equals_eager(family, subtests):
    model = tiny_model(family).train()
    compiled = torch.compile(model, backend="packc", options=DEBUG, fullgraph=True)
    for rows in (RIGHT, LEFT, BOTH, HOLE):
        batch = batch_of(rows)
        with subtests.test(rows=rows):
            assert_as_exact_as_eager(train_step(compiled, batch), model, batch)


def tiny_decoder(family):
    import transformers

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    sliding = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    build, config, options = {
        "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, {}),
        "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config, {}),
        "gemma3": (transformers.Gemma3ForCausalLM, transformers.Gemma3TextConfig, sliding),
    }[family]
    return shaken(build(config(**sizes, **heads, **options)))


@pytest.mark.parametrize("family", ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in ("qwen3", "gemma3"))])
def test_a_decoder_of_attention_alone_packs_whole(family):
    model = tiny_decoder(family)
    compiled = torch.compile(model, backend="packc", options=DEBUG, fullgraph=True)
    for rows in (RIGHT, LEFT, HOLE):
        batch = batch_with_cache(rows)
        assert_as_exact_as_eager(train_step(compiled, batch), model, batch)
    report = packc.explain(model)(**batch_of(RIGHT))
    assert (report.tokens, report.boundaries, [mixer.op for mixer in report.mixers]) == (15, [], [ATTENTION] * 2)


def tiny_inkling(name):
    import transformers

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "eos_token_id": None}
    of_second = {
        "unpadded_vocab_size": 32,
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 1,
        "swa_head_dim": 8,
        "sliding_window_size": 4,
        "rel_extent": 3,
        "n_routed_experts": 2,
        "num_experts_per_tok": 2,
    }
    loop = {
        "num_hidden_layers": 3,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 2,
        "loop_num_passes": 2,
        "loop_gate_rank": 4,
        "n_layers_per_attn_res_block": 1,
    }
    model, options = {
        "inkling": (transformers.InklingForCausalLM, {}),
        "inkling2": (transformers.Inkling2ForCausalLM, {**of_second, "layer_types": ["hybrid_sliding", "hybrid"]}),
        "inkling2_loop": (transformers.Inkling2LoopForCausalLM, {**of_second, **loop}),
    }[name]
    config = transformers.CONFIG_MAPPING[f"{name}_text"]
    return shaken(model(config(**{**sizes, **heads, **options}, experts_implementation="eager")))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "attentions"), [("inkling", 2), ("inkling2", 2), ("inkling2_loop", 4)])
def test_attention_with_biases_and_sinks_of_each_token_packs(name, attentions):
    """As eager, as a router knows no fp64, to 1e-5 or what the last bit of weights makes of its results."""
    model = tiny_inkling(name)
    compiled = torch.compile(model, backend="packc", options=DEBUG, fullgraph=True)
    for rows in (RIGHT, LEFT, HOLE):
        batch, real = batch_of(rows), batch_of(rows)["attention_mask"].bool()
        actual, eager = train_step(compiled, batch), train_step(model, batch)
        bits = [error(train_step(_off_by_a_bit(model), batch), eager, real) for _ in range(4)]
        assert error(actual, eager, real) <= max(1e-5, *bits)
    report = packc.explain(model)(**batch_of(RIGHT))
    assert (report.tokens, report.boundaries, {mixer.packed for mixer in report.mixers}) == (15, [], {True})
    attention = ATTENTION if name == "inkling" else AsWritten.name
    assert sum(mixer.op == attention for mixer in report.mixers) == attentions


@pytest.mark.slow  # test_hf_mamba.py has a Mamba's, test_kept_strides.py what is saved beside attention and Mamba-2
@pytest.mark.parametrize("family", PACKED)
def test_code_is_generated_for_a_training_step(family):
    model, batch = tiny_model(family).train(), batch_of(RIGHT)
    compiled = torch.compile(model, backend="packc", options={"packc.strict": True}, fullgraph=True)
    assert_as_exact_as_eager(train_step(compiled, batch), model, batch)


@one_family_now_the_others_slow
def test_nothing_runs_padded(family):
    report = packc.explain(tiny_model(family).train())(**batch_of(RIGHT))
    assert (report.tokens, report.fallback) == (15, None)
    layers, scans = MIXERS[family]
    mixers = [mixer.op for mixer in report.mixers if mixer.packed]
    assert (len(mixers) - mixers.count(ATTENTION), len(report.mixers)) == (layers * (1 + scans), len(mixers))
    assert ATTENTION in mixers
    assert report.boundaries == []


@pytest.mark.slow
def test_other_shapes_compile_nothing_new():
    model = tiny_model("bamba").train()
    compiled = torch.compile(model, backend="packc", options={**DEBUG, "packc.strict": True})
    shapes = [RIGHT, [row + "00" for row in RIGHT], [*RIGHT, *RIGHT], ["111" + row for row in RIGHT[:2]]]
    for step, rows in enumerate(shapes):
        with torch._dynamo.config.patch(error_on_recompile=step > 2):
            batch = batch_of(rows)
            assert_as_exact_as_eager(train_step(compiled, batch), model, batch)


def test_rows_with_padding_inside_have_a_head_of_shifted_logits_too():
    model = tiny_decoder("llama")

    def score(input_ids, attention_mask):
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1]
        chosen = logits.log_softmax(-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)
        return (chosen * attention_mask[:, 1:]).sum(-1)

    compiled = torch.compile(score, backend="packc", options=DEBUG, fullgraph=True)
    for rows in (RIGHT, HOLE):
        batch = batch_with_cache(rows)
        inputs = batch["input_ids"], batch["attention_mask"]
        torch.testing.assert_close(compiled(*inputs), score(*inputs), rtol=1e-4, atol=1e-4)
