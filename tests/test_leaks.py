"""Nothing of one document reaches another: not its tokens, not its NaNs, not what lies in its padding."""

import pytest
import torch
from harness import BOTH, LEFT, RIGHT, batch_of, masks, tiny_mamba

DEBUG = {"packc.inner": "aot_eager", "packc.strict": True}


@pytest.fixture
def model_and_compiled():
    model = tiny_mamba()
    return model, torch.compile(model, backend="packc", options=DEBUG)


def test_changing_one_document_changes_nothing_in_another_bit_for_bit(model_and_compiled):
    _, compiled = model_and_compiled
    for rows in (RIGHT, LEFT, BOTH):
        for changed in range(3):
            batch = batch_of(rows)
            before = compiled(**batch).logits
            batch["input_ids"][changed] = batch["input_ids"][changed] % 31 + 1
            after = compiled(**batch).logits
            others = [row for row in range(3) if row != changed]
            assert torch.equal(before[others], after[others])
            assert not torch.equal(before[changed], after[changed])


def test_the_gradient_of_one_documents_output_is_zero_in_the_others(model_and_compiled):
    model, compiled = model_and_compiled
    for rows in (RIGHT, LEFT, BOTH):
        batch = batch_of(rows)
        embeds = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        logits = compiled(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
        logits[1].square().sum().backward()
        assert embeds.grad[[0, 2]].eq(0).all()
        assert embeds.grad[1].ne(0).any()
        assert embeds.grad[masks(rows) == 0].eq(0).all()


def test_nan_in_padding_reaches_nothing(model_and_compiled):
    model, compiled = model_and_compiled
    batch = batch_of(BOTH)
    del batch["labels"]
    clean = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    padding = batch["attention_mask"] == 0
    dirty = clean.masked_fill(padding[..., None], torch.nan).requires_grad_()
    expected = compiled(inputs_embeds=clean, **batch).logits
    actual = compiled(inputs_embeds=dirty, **batch).logits
    assert torch.equal(actual, expected)
    actual.square().sum().backward()
    assert dirty.grad.isfinite().all()
    assert dirty.grad[padding].eq(0).all()


def test_nan_in_one_document_stays_there(model_and_compiled):
    model, compiled = model_and_compiled
    batch = batch_of(RIGHT)
    del batch["labels"]
    clean = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    dirty = clean.clone()
    dirty[1, 2] = torch.nan
    expected = compiled(inputs_embeds=clean, **batch).logits
    actual = compiled(inputs_embeds=dirty, **batch).logits
    assert torch.equal(actual[[0, 2]], expected[[0, 2]])
    assert actual[1, 2:5].isnan().any(-1).all()
    assert torch.equal(actual[1, :2], expected[1, :2])
