"""Stock models of every kind of recurrence: their mixers run packed, and the numbers are eager's."""

import sys
from pathlib import Path

import pytest
import torch
from harness import BOTH, HOLE, LEFT, RIGHT, batch_of, train_step

import packc

sys.path.insert(0, str(Path(__file__).parent / "frontends"))
from tiny_recurrences import FAMILIES, tiny

DEBUG = {"packc.inner": "aot_eager"}
ATTENTION = {"aten.scaled_dot_product_attention.default"}
QUICK = ("qwen3_next",)
each_family = pytest.mark.parametrize(
    "family", [*QUICK, *(pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES if family not in QUICK)]
)


class Doubled:
    """torch, to a modeling file that casts to fp32 whatever it is given: with fp64 in its place."""

    def __getattr__(self, name):
        return torch.float64 if name in ("float32", "float") else getattr(torch, name)


@pytest.fixture
def exact(monkeypatch):
    """The step of an fp64 model in fp64 throughout."""

    def step(model, batch):
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules[type(model).__module__], "torch", Doubled())
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
            return train_step(model, batch)

    return step


def error(actual, exact, real):
    """The largest of all results, each against its own largest value."""
    pairs = [
        (actual[name][real], value[real]) if name == "logits" else (actual[name], value)
        for name, value in exact.items()
    ]
    return max(((x.double() - y).abs().max() / y.abs().max()).item() for x, y in pairs if y.any())


@each_family
def test_a_training_step_equals_eager(family, exact):
    """Within 1e-5 of fp64, or twice what eager is off: gradients of decays are differences of large numbers."""
    model, doubled = tiny(family), tiny(family).double()
    compiled = torch.compile(model, backend="packc", options=DEBUG, fullgraph=True)
    packed, eager = {}, {}
    for name, rows in {"right": RIGHT, "left": LEFT, "both": BOTH, "hole": HOLE}.items():
        batch = {**batch_of(rows), "use_cache": False}
        wanted, real = exact(doubled, batch), batch["attention_mask"].bool()
        packed[name] = error(train_step(compiled, batch), wanted, real)
        eager[name] = error(train_step(model, batch), wanted, real)
    assert max(packed.values()) <= max(1e-5, 2 * max(eager.values())), (packed, eager)


@each_family
def test_every_mixer_packs(family):
    report = packc.explain(tiny(family))(**batch_of(RIGHT), use_cache=False)
    assert (report.tokens, report.fallback) == (15, None)
    assert all(mixer.packed for mixer in report.mixers)
    assert tuple(mixer.op for mixer in report.mixers if mixer.op.startswith("packc.")) == FAMILIES[family].mixers
    assert {boundary.node for boundary in report.boundaries} <= ATTENTION


@each_family
def test_left_padding_stays_out(family):
    batch = {**batch_of(LEFT), "use_cache": False}
    first = batch["attention_mask"].cumsum(1) == 1
    # A label that the padding before it predicts would keep that padding in.
    batch["labels"] = batch["labels"].masked_fill(first, -100)
    compiled = torch.compile(tiny(family), backend="packc", options={**DEBUG, "packc.strict": True})
    if not FAMILIES[family].masks:
        with pytest.raises(packc.NotPacked, match="reads left padding: x is not masked"):
            compiled(**batch)
        return
    before = packc.stats()["tokens"]
    compiled(**batch)
    assert packc.stats()["tokens"] - before == batch["attention_mask"].sum()


@pytest.mark.slow
@each_family
def test_generation_with_a_cache_gives_the_tokens_of_eager(family):
    model, prompt = tiny(family).eval(), batch_of(RIGHT[:1] * 2)["input_ids"]
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 3, "do_sample": False, "use_cache": True}
    expected = model.generate(prompt, **options)
    model.forward = torch.compile(model.forward, backend="packc", options=DEBUG)
    assert torch.equal(model.generate(prompt, **options), expected)
