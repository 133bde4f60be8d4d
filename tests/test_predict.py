"""``Trainer.evaluate`` and ``predict`` pack, and return what stock returns at tokens."""

import sys
from pathlib import Path

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainingArguments

import packc

sys.path.insert(0, str(Path(__file__).parent / "frontends"))
from tiny_models import tiny_model


def collate(rows):
    ids = pad_sequence(rows, batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mamba", "bamba"])
def test_losses_and_predictions_are_those_of_stock(family, tmp_path):
    torch.manual_seed(0)
    rows = [torch.randint(1, 32, (length,)) for length in (7, 3, 5, 9, 2, 8, 4, 6)]
    found = []
    for compiled in (False, True):
        model = tiny_model(family)
        if compiled:
            model.compile(backend="packc", options={"packc.inner": "aot_eager", "packc.strict": True})
        arguments = TrainingArguments(tmp_path, per_device_eval_batch_size=4, report_to="none", use_cpu=True)
        trainer, before = Trainer(model, arguments, data_collator=collate), packc.stats()["tokens"]
        losses = trainer.evaluate(rows)["eval_loss"]
        predicted = trainer.predict(rows)
        found.append((losses, predicted, packc.stats()["tokens"] - before))
    (loss, wanted, none), (loss_of_packc, got, tokens) = found
    assert (none, tokens) == (0, 2 * sum(map(len, rows)))
    assert loss_of_packc == pytest.approx(loss, rel=1e-5)
    real = torch.tensor(wanted.label_ids) != -100
    actual, expected = torch.tensor(got.predictions)[real], torch.tensor(wanted.predictions)[real]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
