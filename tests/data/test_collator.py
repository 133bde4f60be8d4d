"""Examples to batches, padded or flat: nothing of a document is lost, and no label crosses into the next one."""

import pytest
import torch

from packc.data import PackingCollator

EXAMPLES = [{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1]}, {"input_ids": torch.tensor([8, 9])}]


def as_lists(batch):
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def test_padded_rows():
    assert as_lists(PackingCollator(pad_token_id=1)(EXAMPLES)) == {
        "input_ids": [[5, 6, 7], [8, 9, 1]],
        "labels": [[5, 6, 7], [8, 9, -100]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
    }


def test_a_flat_row():
    batch = PackingCollator("flat", seq_idx=True, cu_seq_lens=True)(EXAMPLES)
    assert as_lists(batch) == {
        "input_ids": [[5, 6, 7, 8, 9]],
        "labels": [[-100, 6, 7, -100, 9]],
        "position_ids": [[0, 1, 2, 0, 1]],
        "seq_idx": [[0, 0, 0, 1, 1]],
        "cu_seq_lens_q": [0, 3, 5],
        "cu_seq_lens_k": [0, 3, 5],
        "max_length_q": 3,
        "max_length_k": 3,
    }
    assert batch["cu_seq_lens_q"].dtype == batch["seq_idx"].dtype == torch.int32


def test_labels_and_further_inputs_are_kept_and_cut():
    examples = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "token_type_ids": [0, 1, 1]}]
    for form in ("padded", "flat"):
        batch = as_lists(PackingCollator(form, max_length=2)(examples))
        assert (batch["labels"], batch["token_type_ids"]) == ([[-100, 2]], [[0, 1]])


def test_a_batch_is_that_of_transformers():
    from transformers import DataCollatorWithFlattening

    examples = [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}]
    theirs = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(examples)
    ours = PackingCollator("flat", seq_idx=True, cu_seq_lens=True)(examples)
    assert as_lists(ours) == as_lists(theirs)


@pytest.mark.parametrize(
    ("options", "examples", "message"),
    [
        ({"form": "packed"}, [], "form must be"),
        ({"seq_idx": True}, [], "flat already"),
        ({}, [{"input_ids": [1, 2], "labels": [1]}], "one entry per token"),
        ({}, [{"input_ids": [1, 2], "attention_mask": [1, 0]}], "has padding"),
    ],
)
def test_what_does_not_fit_raises(options, examples, message):
    with pytest.raises(ValueError, match=message):
        PackingCollator(**options)(examples)
