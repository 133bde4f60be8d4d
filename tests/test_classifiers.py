"""Classifiers of sequences and of tokens: the model packs, and the numbers are eager's, whatever their head reads."""

import sys
from pathlib import Path

import pytest
import torch
from harness import BOTH, HOLE, LEFT, RIGHT, batch_of, shaken

import packc

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import transformers
from families import FAMILIES, configuration

DEBUG = {"packc.inner": "aot_eager"}
STEMS = {"jamba": "Jamba", "zamba": "Zamba", "zamba2": "Zamba2", "llama": "Llama", "bert": "Bert"}
STEMS |= {"qwen3_next": "Qwen3Next", "qwen3_5": "Qwen3_5"}
ON = ("ForSequenceClassification", "ForTokenClassification")
KINDS = [(family, on) for family in STEMS for on in ON if hasattr(transformers, STEMS[family] + on)]
BY_DEFAULT = (("jamba", ON[0]), ("llama", ON[1]), ("bert", ON[0]))
each_kind = pytest.mark.parametrize(
    ("family", "on"), [pytest.param(*kind, marks=() if kind in BY_DEFAULT else pytest.mark.slow) for kind in KINDS]
)


def classifier(family, on):
    model = getattr(transformers, STEMS[family] + on)
    named = FAMILIES[family].config
    config = getattr(transformers, named) if named else model.config_class
    return shaken(model(config(**configuration(family, 32, 2), num_labels=3))).eval()


def labelled(rows, on):
    """Padding carries the id of padding, by which a head finds the last token."""
    batch = batch_of(rows, vocab=512)
    ids, mask, _ = batch.values()
    per_token = (ids % 3).masked_fill(mask == 0, -100)
    labels = per_token if on == ON[1] else torch.arange(len(rows)) % 3
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


@each_kind
def test_a_training_step_equals_eager(family, on, subtests):
    model = classifier(family, on)
    compiled = torch.compile(model, backend="packc", options=DEBUG, fullgraph=True)
    for rows in (RIGHT, LEFT, BOTH, HOLE):
        with subtests.test(rows=rows):
            assert_same(compiled, model, labelled(rows, on), of_tokens=on == ON[1])


def assert_same(compiled, model, batch, *, of_tokens):
    results = []
    for forward in (compiled, model):
        model.zero_grad()
        out = forward(**batch)
        out.loss.backward()
        logits = out.logits[batch["attention_mask"].bool()] if of_tokens else out.logits
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append({"loss": out.loss.detach(), "logits": logits.detach(), **gradients})
    actual, expected = results
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=1e-5 * value.abs().max().item(), msg=name)


@each_kind
def test_the_model_packs(family, on):
    report = packc.explain(classifier(family, on))(**labelled(RIGHT, on))
    assert report.tokens == 15, report
    assert all(mixer.packed for mixer in report.mixers)
