"""A run of transformers' Trainer: resumed from a checkpoint, evaluated, and its predictions."""

import pytest
import torch
from harness import tiny_mamba
from transformers import Trainer, TrainingArguments

import packc


def rows(lengths):
    draw = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(1, 32, (length,), generator=draw)} for length in lengths]


def padded(features):
    ids = [feature["input_ids"] for feature in features]
    tokens = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(each) for each in ids], batch_first=True)
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


def trainer(folder, packed=True):
    torch.manual_seed(0)
    model = tiny_mamba(layers=1)
    if packed:
        model.compile(backend="packc", options={"packc.inner": "aot_eager", "packc.strict": True})
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=4,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=3,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        save_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    data = rows([9, 4, 7, 5, 2, 8, 3, 6] * 2)
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data[:3], data_collator=padded)


@pytest.mark.slow
def test_resumed_from_a_checkpoint_it_ends_at_the_same_weights_and_scores_as_stock(tmp_path):
    through = trainer(tmp_path / "through")
    through.train()
    resumed = trainer(tmp_path / "through")
    resumed.train(resume_from_checkpoint=str(tmp_path / "through" / "checkpoint-2"))
    for name, value in through.model.state_dict().items():
        assert value.equal(resumed.model.state_dict()[name]), name
    before = packc.stats()["tokens"]
    score, predictions = through.evaluate(), through.predict(through.eval_dataset).predictions
    assert packc.stats()["tokens"] - before == 2 * (9 + 4 + 7)
    stock = trainer(tmp_path / "stock", packed=False)
    stock.train()
    assert score["eval_loss"] == pytest.approx(stock.evaluate()["eval_loss"], rel=1e-4)
    expected = stock.predict(stock.eval_dataset).predictions
    assert predictions.shape == expected.shape
    mask = padded(through.eval_dataset)["attention_mask"].bool().numpy()
    assert predictions[mask] == pytest.approx(expected[mask], rel=1e-3, abs=1e-3)
