"""The span of each row that is packed: everything that could change a result stays in."""

import pytest
import torch
from harness import masks

from packc.batches import pack_batches
from packc.facts import Labelled, Rows


def spans(rows, labels=None, **keep):
    """Which positions of each row are packed, as pictures, and the reasons for whole rows."""
    mask = masks(rows)
    labelled = [] if labels is None else [Labelled(masks(labels), 0)]
    (packing,) = pack_batches([Rows(mask, labelled, **keep)])
    kept = torch.zeros_like(mask).flatten()
    kept[packing.index] = 1
    assert packing.cu_seqlens.tolist() == [0, *kept.view_as(mask).sum(1).cumsum(0).tolist()]
    assert packing.index.equal(packing.index.sort().values)
    assert (packing.tokens, packing.padded_tokens) == (int(kept.sum()), mask.numel())
    return ["".join(map(str, row)) for row in kept.view_as(mask).tolist()], tuple(packing.reasons)


@pytest.mark.parametrize(
    "rows", [["1111", "1100"], ["0011", "0001"], ["0110", "1111"], ["0000", "0111"], ["1000", "0001"]]
)
def test_tokens_in_one_run_are_packed_alone(rows):
    assert spans(rows) == (rows, ())


def test_a_row_with_a_hole_stays_whole_and_the_others_are_packed():
    packed, (reason,) = spans(["1011", "1100", "0011"])
    assert packed == ["1111", "1100", "0011"]
    assert "between tokens" in reason


def test_a_live_label_on_right_padding_keeps_the_row_whole():
    packed, (reason,) = spans(["1100", "1100"], labels=["1110", "1100"])
    assert packed == ["1111", "1100"]
    assert "label" in reason


def test_the_label_of_a_left_padded_rows_first_token_lets_it_begin_one_earlier():
    assert spans(["0011", "0111"], labels=["0110", "0110"]) == (["0111", "0111"], ())


def test_a_label_further_left_keeps_the_row_whole():
    assert spans(["0001"], labels=["0100"])[0] == ["1111"]


def test_a_label_in_an_empty_row_keeps_it_whole():
    assert spans(["0000", "0111"], labels=["0100", "0100"])[0] == ["1111", "0111"]


def test_mask_values_other_than_zero_and_one_keep_the_row_whole():
    (packing,) = pack_batches([Rows(torch.tensor([[1.0, 0.5, 0.0], [1.0, 0.0, 0.0]]))])
    assert packing.cu_seqlens.tolist() == [0, 3, 4]
    assert packing.reasons == {"mask values other than 0 and 1": 1}


def test_a_row_of_zeros_beside_other_values_stays_whole():
    """Of a mask that is added, zeros are tokens."""
    (packing,) = pack_batches([Rows(torch.tensor([[0.0, 0.0, 0.0], [0.0, -1e9, -1e9]]))])
    assert packing.cu_seqlens.tolist() == [0, 3, 6]


def test_padding_may_have_to_stay_on_both_sides():
    packed, reasons = spans(["0110", "0011", "1100"], keep_left="left", keep_right="right")
    assert packed == ["1111", "1111", "1111"]
    assert reasons == ("left", "right")


def test_where_padding_attends_all_of_it_stays_or_none():
    rows = ["0110", "0011", "1100", "1111"]
    assert spans(rows, padding_attends=True) == (rows, ())
    assert spans(rows, padding_attends=True, keep_left="left")[0] == ["1111", "1111", "1100", "1111"]
    assert spans(rows, padding_attends=True, keep_right="right")[0] == ["1111", "0011", "1111", "1111"]
    assert spans(rows, padding_attends=True, one_before=True)[0] == ["1111", "1111", "1100", "1111"]


@pytest.mark.parametrize("rows", [["0000", "0000"], ["0100", "0000"]])
def test_fewer_than_two_tokens_run_as_whole_rows(rows):
    assert spans(rows) == (["1111", "1111"], ())


def test_padding_that_must_stay_stays_with_the_reason():
    assert spans(["0110", "1111"], keep_left="it is read") == (["1110", "1111"], ("it is read",))
    assert spans(["0110", "1111"], keep_right="it is read") == (["0111", "1111"], ("it is read",))
    assert spans(["1100", "1111"], keep_left="it is read") == (["1100", "1111"], ())


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.bfloat16])
def test_masks_of_any_dtype(dtype):
    (packing,) = pack_batches([Rows(masks(["0110", "1000"]).to(dtype))])
    assert packing.index.tolist() == [1, 2, 4]
    assert (packing.index.dtype, packing.cu_seqlens.dtype) == (torch.int64, torch.int32)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_a_batch_of_nothing(shape):
    (packing,) = pack_batches([Rows(torch.ones(shape))])
    assert packing.index.tolist() == []
    assert packing.cu_seqlens.tolist() == [0] * (shape[0] + 1)
