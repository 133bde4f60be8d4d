"""Classifiers of sequences and of tokens: the model packs, and the numbers are eager's, whatever their head reads."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from harness import BOTH, HOLE, LEFT, RIGHT, batch_of, shaken, train_step
from test_hf_recurrences import exact  # noqa: F401

import packc

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import transformers
from families import FAMILIES, configuration

DEBUG = {"packc.inner": "aot_eager"}
STEMS = {"jamba": "Jamba", "zamba": "Zamba", "zamba2": "Zamba2", "llama": "Llama", "bert": "Bert"}
STEMS |= {"qwen3_next": "Qwen3Next", "qwen3_5": "Qwen3_5"}
ON = ("ForSequenceClassification", "ForTokenClassification")
KINDS = [(family, on) for family in STEMS for on in ON if hasattr(transformers, STEMS[family] + on)]
BY_DEFAULT = (("llama", ON[1]), ("bert", ON[0]))
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
def test_a_training_step_is_as_exact_as_eager(family, on, exact):  # noqa: F811
    """Within 1e-5 of fp64, or twice what eager is off."""
    model = classifier(family, on)
    compiled = torch.compile(model, backend="packc", options=DEBUG, fullgraph=True)
    reference = copy.deepcopy(model)
    reference.set_experts_implementation("eager")  # the one way that there is in fp64 too
    packed, eager = [], []
    for rows in (RIGHT, LEFT, BOTH, HOLE):
        batch = labelled(rows, on)
        real = batch["attention_mask"].bool() if on == ON[1] else slice(None)
        wanted = exact(copy.deepcopy(reference).double(), batch)
        packed.append(error(train_step(compiled, batch), wanted, real))
        eager.append(error(train_step(reference, batch), wanted, real))
    assert max(packed) <= max(1e-5, 2 * max(eager)), (packed, eager)


def error(actual, wanted, real):
    """The largest of all results against its own largest value; what is zero but for rounding, against all others'."""
    least = 1e-6 * max(value.abs().max().item() for value in wanted.values())
    pairs = [
        (actual[name][real], value[real]) if name == "logits" else (actual[name], value)
        for name, value in wanted.items()
    ]
    return max(((x.double() - y).abs().max() / max(y.abs().max().item(), least)).item() for x, y in pairs)


@each_kind
def test_the_model_packs(family, on):
    report = packc.explain(classifier(family, on))(**labelled(RIGHT, on))
    assert report.tokens == 15, report
    assert all(mixer.packed for mixer in report.mixers)
