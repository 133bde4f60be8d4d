"""Attention from one sequence to another runs padded; what is before and after it, in both of them, is packed."""

import copy

import pytest
import torch
from harness import BOTH, EMPTY_ROW, HOLE, LEFT, RIGHT, masks
from torch import nn
from torch.nn import functional as F

import packc

DEBUG = {"packc.inner": "aot_eager"}
OTHER = ["11000", "11111", "11110"]
AS_LONG = ["11000000", "11111111", "11111100"]


def heads(x):
    return x.unflatten(-1, (2, -1)).transpose(1, 2)


class Translator(nn.Module):
    """Self-attention in each, and attention of the one to the other, written as libraries do."""

    def __init__(self, written_out=False, hidden=8):
        super().__init__()
        self.tokens, self.head = nn.Embedding(32, hidden), nn.Linear(hidden, 32)
        self.mix, self.of_others = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, 3 * hidden)
        self.written_out = written_out

    def attend(self, q, k, v, visible):
        if not self.written_out:
            return F.scaled_dot_product_attention(q, k, v, visible).transpose(1, 2).flatten(2)
        added = torch.zeros_like(visible, dtype=q.dtype).masked_fill(~visible, torch.finfo(q.dtype).min)
        return ((q @ k.mT * 0.5 + added).softmax(-1) @ v).transpose(1, 2).flatten(2)

    def forward(self, input_ids, attention_mask, decoder_input_ids, decoder_attention_mask):
        h, d = self.tokens(input_ids), self.tokens(decoder_input_ids)
        places = torch.arange(d.shape[1])
        keys, own = attention_mask.bool()[:, None, None], decoder_attention_mask.bool()[:, None, None]
        h = h + self.attend(*map(heads, self.mix(h).chunk(3, -1)), keys)
        d = d + self.attend(*map(heads, self.mix(d).chunk(3, -1)), own & (places <= places[:, None]))
        q, (_, k, v) = self.of_others(d)[..., :8], self.of_others(h.relu()).chunk(3, -1)
        d = d + self.attend(*map(heads, (q, k, v)), keys)
        return self.head(d.relu()), h


def batch_of(rows, others):
    ids = [torch.randint(1, 32, masks(each).shape) for each in (rows, others)]
    return ids[0], masks(rows), ids[1], masks(others)


def step(model, exact, batch):
    """Results at tokens, and all gradients."""
    results = [out[real == 1] for out, real in zip(model(*batch), (batch[3], batch[1]), strict=True)]
    loss = sum(each.square().sum() for each in results)
    return [*results, *torch.autograd.grad(loss, list(exact.parameters()))]


def compared(model, compiled, batch):
    exact = copy.deepcopy(model).double()
    for got, want in zip(step(compiled, model, batch), step(exact, exact, batch), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("written_out", [pytest.param(False, id="op", marks=pytest.mark.slow), True])
def test_both_sequences_are_packed_around_it(written_out):
    model = Translator(written_out)
    compiled = torch.compile(model, backend="packc", options=DEBUG, dynamic=True)
    for rows, others in ((RIGHT, OTHER), (LEFT, AS_LONG), (BOTH, OTHER)):
        compared(model, compiled, batch_of(rows, others))
    report = packc.explain(model)(*batch_of(RIGHT, OTHER))
    assert [stream.tokens for stream in report.streams] == [15, 11]
    assert [mixer.packed for mixer in report.mixers] == [True, True]
    assert [boundary.reason for boundary in report.boundaries] == ["attends from one sequence to another: runs padded"]


@pytest.mark.filterwarnings("ignore:packc left")
def test_rows_that_run_whole():
    model = Translator(written_out=True)
    compared(model, torch.compile(model, backend="packc", options=DEBUG), batch_of(HOLE, AS_LONG))


def test_a_row_without_a_key():
    """Stock gives its queries a mean of padding, or what there is of a softmax of nothing."""
    model, batch = Translator(), batch_of(EMPTY_ROW, OTHER)
    compiled = torch.compile(model, backend="packc", options=DEBUG)
    with pytest.warns(UserWarning, match="another sequence attends to a row without tokens"):
        got = compiled(*batch)[0]
    torch.testing.assert_close(got[batch[3] == 1], model(*batch)[0][batch[3] == 1], equal_nan=True)
    model.written_out = True
    with pytest.raises(packc.NotPacked, match="a row without tokens"):
        compiled(*batch)
    compared(model, compiled, batch_of(EMPTY_ROW, ["11000", "00000", "11110"]))


def test_a_mask_that_shows_keys_of_padding_leaves_the_keys_unpacked():
    class Shows(Translator):
        def attend(self, q, k, v, visible):
            cross = q.shape[2] != k.shape[2]
            return super().attend(q, k, v, visible | True if cross else visible)

    model = Shows()
    report = packc.explain(model)(*batch_of(RIGHT, OTHER))
    assert [stream.mask for stream in report.streams] == ["decoder_attention_mask"]
    compared(model, torch.compile(model, backend="packc", options=DEBUG), batch_of(RIGHT, OTHER))


def test_documents_in_a_row_raise():
    compiled = torch.compile(Translator(), backend="packc", options=DEBUG)
    batch = batch_of(["11111111"] * 3, OTHER)
    for name, length in (("attention_mask", 8), ("decoder_attention_mask", 5)):
        numbers = torch.arange(length).ge(2).int().expand(3, length)
        with (
            packc.documents(seq_idx={name: numbers}),
            pytest.raises(packc.NotPacked, match="attends from one sequence"),
        ):
            compiled(*batch)
