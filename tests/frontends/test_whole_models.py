"""Each mixer of an unmodified model is one conv node and one scan node in the one graph that packc's backend gets."""

import pytest
import torch
from tiny_models import MAMBA2, MIXERS, batch, tiny_model

import packc.frontends

packc.frontends.install()

CONV, SCAN = torch.ops.packc.causal_conv1d.default, torch.ops.packc.selective_scan.default
SSD = torch.ops.packc.ssd.default


def run(model, inputs):
    out = model(**inputs)
    gradients = {}
    if model.training:
        model.zero_grad()
        out.loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), "loss": out.loss.detach(), **gradients}


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=1e-5 * value.abs().max().item(), msg=name)


@pytest.mark.parametrize(
    ("family", "train"),
    [
        *((family, True) for family in ("mamba", "falcon_mamba", "jamba", "zamba", "mamba2")),
        ("mamba", False),
        *(pytest.param(family, True, marks=pytest.mark.slow) for family in MAMBA2 if family != "mamba2"),
        *(pytest.param(family, False, marks=pytest.mark.slow) for family in MIXERS if family != "mamba"),
    ],
)
def test_one_graph_with_one_node_per_function_and_the_numbers_of_eager(family, train, packc_backend):
    model, inputs = tiny_model(family).train(train), batch()
    expected = run(model, inputs)
    model.compile(backend=packc_backend, fullgraph=True)
    assert_equal(run(model, inputs), expected)
    mixers, scans = MIXERS[family]
    assert len(packc_backend.graphs) == 1
    assert packc_backend.calls(CONV) == mixers
    assert packc_backend.calls(SSD if family in MAMBA2 else SCAN) == mixers * scans
    assert not [node for node in packc_backend.graphs[0].nodes if node.op == "get_attr"]


one_family_now_the_others_slow = pytest.mark.parametrize(
    "family", ["mamba", *(pytest.param(family, marks=pytest.mark.slow) for family in MIXERS if family != "mamba")]
)


@one_family_now_the_others_slow
def test_any_length_runs_in_the_same_graph_once_the_length_is_dynamic(family, packc_backend):
    model = tiny_model(family).train()
    compiled = torch.compile(model, backend=packc_backend, fullgraph=True)
    for index, length in enumerate((7, 9, 12)):
        with torch._dynamo.config.patch(error_on_recompile=index > 1):
            compiled(**batch(length)).loss.backward()


def test_a_checkpointed_layer_keeps_its_functions_whole(packc_backend):
    model, inputs = tiny_model("mamba", layers=1).train(), batch()
    expected = run(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.compile(backend=packc_backend, fullgraph=True)
    assert_equal(run(model, inputs), expected)
    bodies = [m.graph for m in packc_backend.graphs[0].owning_module.modules() if isinstance(m, torch.fx.GraphModule)]
    scans = [node for graph in bodies for node in graph.nodes if node.target is SCAN]
    assert len(scans) == 1


@one_family_now_the_others_slow
def test_generation_with_a_cache_gives_the_tokens_of_eager(family, packc_backend):
    model = tiny_model(family)
    prompt = batch(length=6)["input_ids"]
    mask = torch.ones_like(prompt)
    generate = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(prompt, attention_mask=mask, **generate)
    model.forward = torch.compile(model.forward, backend=packc_backend)
    assert torch.equal(model.generate(prompt, attention_mask=mask, **generate), expected)
    assert packc_backend.calls(SSD if family in MAMBA2 else SCAN) > 0


def test_the_cache_after_a_compiled_prompt_is_that_of_eager(packc_backend):
    model = tiny_model("mamba")
    prompt, token = batch(length=6)["input_ids"], torch.tensor([[3], [4]])
    compiled = torch.compile(model, backend=packc_backend)
    with torch.no_grad():
        outputs = []
        for forward in (model, compiled):
            cache = forward(prompt, use_cache=True).cache_params
            outputs.append((cache, forward(token, cache_params=cache, use_cache=True).logits))
    (expected_cache, expected), (cache, logits) = outputs
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    for layer, expected_layer in zip(cache.layers, expected_cache.layers, strict=True):
        state, expected_state = layer.recurrent_states[0], expected_layer.recurrent_states[0]
        torch.testing.assert_close(state, expected_state, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.conv_states[0], expected_layer.conv_states[0])
