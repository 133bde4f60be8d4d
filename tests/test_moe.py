"""Mixtures of experts: routers and experts see real tokens alone, and the numbers are stock's."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import transformers
from harness import BOTH, HOLE, LEFT, RIGHT, RecordingBackend, assert_same_step, batch_of, shaken, train_step
from test_hf_hybrids import ATTENTION, DEBUG, assert_as_exact_as_eager
from torch import nn
from torch.nn import functional as F

import packc

sys.path.insert(0, str(Path(__file__).parent / "frontends"))
from functions import GROUPS_BACKWARD
from tiny_models import tiny_model

pytestmark = pytest.mark.skipif(not GROUPS_BACKWARD, reason="the backward of grouped experts cannot be traced")

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "head_dim": 8}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_experts_per_tok": 2, "router_aux_loss_coef": 1.0}


def tiny_mixtral(layers):
    config = transformers.MixtralConfig(**SIZES, num_hidden_layers=layers, num_local_experts=3)
    return transformers.MixtralForCausalLM(config)


def tiny_qwen3_moe():
    config = transformers.Qwen3MoeConfig(**SIZES, num_hidden_layers=2, num_experts=3, moe_intermediate_size=16)
    return transformers.Qwen3MoeForCausalLM(config)


BUILD = {
    "mixtral": lambda layers=1: shaken(tiny_mixtral(layers)),
    "qwen3_moe": lambda: shaken(tiny_qwen3_moe()),
    "jamba": lambda: tiny_model("jamba").train(),
    "granitemoehybrid": lambda: tiny_model("granitemoehybrid").train(),
}
IMPLEMENTATIONS = ("grouped_mm", "batched_mm", "eager")
BY_DEFAULT = (("mixtral", "batched_mm"), ("jamba", "grouped_mm"))
each_way = pytest.mark.parametrize(
    ("family", "implementation"),
    [
        *BY_DEFAULT,
        *(
            pytest.param(family, implementation, marks=pytest.mark.slow)
            for family in BUILD
            for implementation in IMPLEMENTATIONS
            if (family, implementation) not in BY_DEFAULT
        ),
    ],
)


def model_and_reference(family, implementation, **sizes):
    """The reference has its experts in a loop, the one way that there is in fp64 too."""
    model = BUILD[family](**sizes)
    reference = copy.deepcopy(model)
    model.set_experts_implementation(implementation)
    reference.set_experts_implementation("eager")
    return model, reference


@each_way
def test_a_training_step_equals_eager(family, implementation, subtests):
    model, reference = model_and_reference(family, implementation)
    compiled = torch.compile(model, backend="packc", options=DEBUG, fullgraph=True)
    for rows in (RIGHT, LEFT, BOTH, HOLE):
        batch = {**batch_of(rows), "use_cache": False}
        with subtests.test(rows=rows):
            assert_as_exact_as_eager(train_step(compiled, batch), reference, batch)


@each_way
def test_routers_and_experts_are_no_boundaries(family, implementation):
    model, _ = model_and_reference(family, implementation)
    report = packc.explain(model)(**batch_of(RIGHT), use_cache=False)
    assert (report.tokens, report.fallback) == (15, None)
    assert {boundary.node for boundary in report.boundaries} <= {ATTENTION}


def test_experts_that_are_given_all_tokens_one_after_the_other_are_given_real_ones(subtests):
    sizes = SIZES | {"intermediate_size_mlp": 16, "attention_chunk_size": 3, "pad_token_id": 0}
    config = transformers.Llama4TextConfig(**sizes, num_hidden_layers=2, num_local_experts=3)
    model = shaken(transformers.Llama4ForCausalLM(config))
    reference, compiled = copy.deepcopy(model), torch.compile(model, backend="packc", options=DEBUG, fullgraph=True)
    for rows in (RIGHT, LEFT, BOTH):
        batch = {**batch_of(rows), "use_cache": False}
        with subtests.test(rows=rows):
            assert_as_exact_as_eager(train_step(compiled, batch), reference, batch)
    report = packc.explain(model)(**batch_of(RIGHT), use_cache=False)
    assert [report.tokens, report.fallback, report.boundaries] == [15, None, []]


def test_experts_that_cannot_be_traced_loop_as_stock_does(monkeypatch):
    monkeypatch.delattr("transformers.integrations.moe._grouped_mm_fallback_backward_fake")  # as before 5.23
    model, reference = model_and_reference("mixtral", "eager")
    batch = {**batch_of(RIGHT), "use_cache": False}
    compiled = torch.compile(model, backend="packc", options=DEBUG)
    assert_as_exact_as_eager(train_step(compiled, batch), reference, batch)


class Experts(nn.Module):
    """A language model whose tokens never meet, its experts those of Mixtral."""

    def __init__(self, implementation):
        super().__init__()
        mixtral = tiny_mixtral(layers=2)
        mixtral.set_experts_implementation(implementation)
        self.tokens, self.head = nn.Embedding(32, 16), nn.Linear(16, 32)
        self.layers = nn.ModuleList(layer.mlp for layer in mixtral.model.layers)

    def forward(self, input_ids, attention_mask, labels):
        hidden = self.tokens(input_ids)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        logits = self.head(hidden)
        loss = F.cross_entropy(logits.flatten(0, 1) * attention_mask.view(-1, 1), labels.flatten())
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager", pytest.param("batched_mm", marks=pytest.mark.slow)])
def test_a_token_is_gathered_once_and_scattered_once(implementation):
    backend = RecordingBackend()
    torch.compile(shaken(Experts(implementation)), backend=backend, fullgraph=True)(**batch_of(RIGHT))
    assert backend.op_count(torch.ops.packc.unpack.default) == 1  # the logits
    assert backend.op_count(torch.ops.packc.begin_row_wise.default) == 0


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_generated_code_serves_every_shape(implementation):
    model = shaken(Experts(implementation))
    compiled = torch.compile(model, backend="packc", options={"packc.strict": True}, fullgraph=True)
    shapes = [RIGHT, [row + "00" for row in RIGHT], [*RIGHT, *RIGHT], ["111" + row for row in RIGHT[:2]]]
    for step, rows in enumerate(shapes):
        with torch._dynamo.config.patch(error_on_recompile=step > 2):
            batch = batch_of(rows)
            assert_same_step(train_step(compiled, batch), train_step(model, batch), batch["attention_mask"])


def test_padding_has_no_part_in_what_experts_give_to_tokens():
    compiled = torch.compile(shaken(Experts("grouped_mm")), backend="packc", options=DEBUG, fullgraph=True)
    batch = batch_of(RIGHT)
    real = batch["attention_mask"].bool()
    other = {**batch, "input_ids": batch["input_ids"].where(real, torch.randint(1, 32, real.shape))}
    assert torch.equal(compiled(**batch).logits, compiled(**other).logits)


def with_routers_read(model, batch):
    """transformers installs hooks for them when they are first asked for, which Dynamo cannot."""
    batch = {**batch, "output_router_logits": True, "use_cache": False}
    model(**batch)
    return batch


@pytest.mark.parametrize(
    "family", ["mixtral", *(pytest.param(f, marks=pytest.mark.slow) for f in BUILD if f != "mixtral")]
)
def test_the_balancing_loss_is_that_of_eager(family):
    # The loss is of all layers' routers.
    model, reference = model_and_reference(family, "grouped_mm", **({"layers": 2} if family == "mixtral" else {}))
    batch = with_routers_read(model, batch_of(RIGHT))
    compiled = torch.compile(model, backend="packc", options=DEBUG, fullgraph=True)
    for rows in (RIGHT, LEFT, HOLE):
        batch, before = {**batch, **batch_of(rows)}, packc.stats()["tokens"]
        expected, actual = reference(**batch), compiled(**batch)
        assert rows is not RIGHT or packc.stats()["tokens"] - before == 15
        torch.testing.assert_close(actual.aux_loss, expected.aux_loss, rtol=1e-5, atol=0)
        assert_as_exact_as_eager(train_step(compiled, batch), reference, batch)


def test_a_balancing_loss_that_counts_padding_is_not_packed():
    balance = transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func
    model, _ = model_and_reference("mixtral", "grouped_mm")
    batch = with_routers_read(model, batch_of(RIGHT))

    def loss(**batch):
        return balance(model.model(**batch).router_logits, 3, 2)

    del batch["labels"]
    torch.testing.assert_close(torch.compile(loss, backend="packc", options=DEBUG)(**batch), loss(**batch))
    report = packc.explain(loss)(**batch)
    assert report.tokens is None
    assert "not masked at padding" in report.fallback


def test_a_checkpointed_layer_keeps_its_experts():
    model, reference = model_and_reference("mixtral", "grouped_mm")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    compiled = torch.compile(model, backend="packc", options={**DEBUG, "packc.strict": True}, fullgraph=True)
    batch = {**batch_of(RIGHT), "use_cache": False}
    assert_as_exact_as_eager(train_step(compiled, batch), reference, batch)


def test_what_is_not_packed_runs_on_all_rows():
    model = shaken(Experts("grouped_mm"))
    batch = batch_of(RIGHT)
    compiled = torch.compile(lambda **batch: model(**batch).logits.cumsum(1), backend="packc", options=DEBUG)
    unmasked = {**batch, "attention_mask": batch["attention_mask"].float().unsqueeze(-1)}  # no mask to pack by
    torch.testing.assert_close(compiled(**unmasked), model(**unmasked).logits.cumsum(1), rtol=1e-5, atol=1e-5)
