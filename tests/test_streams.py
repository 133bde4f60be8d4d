"""Several sequences in one graph, each with a mask: all are packed, each by its own."""

import copy

import pytest
import torch
from harness import BOTH, FULL, HOLE, LEFT, RIGHT, PlainLM, masks
from rows import Mixed, alone, numbers, positions
from torch.nn import functional as F

import packc
from packc import packed_call

DEBUG = {"packc.inner": "aot_eager", "packc.strict": True}
OTHER = ["11000000", "11111111", "11111100"]
LONGER = [row + "00" for row in OTHER]
TAPS = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))


def mix(x):
    return packc.ops.causal_conv1d(x, TAPS, activation="silu")


def towers(x, x_attention_mask, y, y_attention_mask):
    return mix(x * x_attention_mask[..., None]), mix(y * y_attention_mask[..., None])


def inputs(rows, others):
    return torch.randn(*masks(rows).shape, 4), masks(rows), torch.randn(*masks(others).shape, 4), masks(others)


def answers(rows):
    return {"input_ids": torch.randint(1, 32, masks(rows).shape), "attention_mask": masks(rows)}


def preference(model):
    """A step of DPO, without the reference model."""

    def log_probs(input_ids, attention_mask):
        logits = model.head(model.hidden(input_ids, attention_mask))[:, :-1]
        chosen = logits.log_softmax(-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)
        return (chosen * attention_mask[:, 1:]).sum(-1)

    def loss(chosen, rejected):
        return -F.logsigmoid(0.1 * (log_probs(**chosen) - log_probs(**rejected))).mean()

    return loss


def step(loss, model, *batch):
    value = loss(*batch)
    value.backward()
    gradients = [parameter.grad.double() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return [value.detach().double(), *gradients]


def test_each_keeps_its_own_tokens():
    fast = torch.compile(towers, backend="packc", options=DEBUG)
    for number, pair in enumerate(((RIGHT, OTHER), (LEFT, LONGER), (BOTH, OTHER[:2]), (FULL, RIGHT), (OTHER, LEFT))):
        x, mask, y, other = inputs(*pair)
        with torch._dynamo.config.patch(error_on_recompile=number > 2):
            got = fast(x, mask, y, other)
        for result, want, real in zip(got, towers(x, mask, y, other), (mask, other), strict=True):
            torch.testing.assert_close(result[real == 1], want[real == 1])
            assert result[real == 0].eq(0).all()


def test_a_preference_step_packs_both_answers():
    model = PlainLM()
    exact = copy.deepcopy(model).double()
    fast, loss = torch.compile(preference(model), backend="packc", options=DEBUG), preference(exact)
    for pair in ((RIGHT, OTHER), (LEFT, LONGER)):
        batch = [answers(rows) for rows in pair]
        for got, want in zip(step(fast, model, *batch), step(loss, exact, *batch), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * want.abs().max().item())


def test_the_host_is_asked_once(monkeypatch):
    asked = []
    pack_batches = packed_call.pack_batches
    monkeypatch.setattr(packed_call, "pack_batches", lambda rows: asked.append(len(rows)) or pack_batches(rows))
    copies = []
    cpu = torch.Tensor.cpu
    fast = torch.compile(towers, backend="packc", options=DEBUG)
    given = inputs(RIGHT, OTHER)
    fast(*given)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copies.append(self.shape) or cpu(self))
    with packc.config.patch(kernels="reference"):  # C++ needs no copy of what is on the host
        fast(*given)
    assert asked == [2, 2]
    assert len(copies) == 1


def test_explain_tells_them_apart():
    report = packc.explain(preference(PlainLM()))(answers(RIGHT), answers(LONGER))
    assert report.streams == [("chosen.attention_mask", 15, 24), ("rejected.attention_mask", 16, 30)]
    assert (report.tokens, report.padded_tokens, report.fallback) == (31, 54, None)
    assert all(mixer.packed for mixer in report.mixers)
    assert "rejected.attention_mask: 16 of 30" in str(report)


@pytest.mark.parametrize(
    ("named", "packed"),
    [
        ("chosen.attention_mask,rejected.attention_mask", ["chosen", "rejected"]),
        (["rejected.attention_mask", "chosen.attention_mask"], ["rejected", "chosen"]),
        ("rejected.attention_mask", ["rejected"]),
    ],
)
def test_masks_are_named_by_their_paths(named, packed):
    report = packc.explain(preference(PlainLM()), options={"packc.mask": named})(answers(RIGHT), answers(OTHER))
    assert [stream.mask for stream in report.streams] == [f"{each}.attention_mask" for each in packed]


def test_three_of_them():
    def function(a, a_mask, b, b_mask, c, c_mask):
        return (*towers(a, a_mask, b, b_mask), mix(c * c_mask[..., None]))

    given = (*inputs(RIGHT, LONGER), *inputs(LEFT, LEFT)[:2])
    fast = torch.compile(function, backend="packc", options={**DEBUG, "packc.mask": "a_mask,b_mask,c_mask"})
    for got, want, real in zip(fast(*given), function(*given), given[1::2], strict=True):
        torch.testing.assert_close(got[real == 1], want[real == 1])


def test_attention_in_each_and_padding_that_one_of_them_keeps():
    """A hole in a row of the one takes both through the graph in which attention runs padded."""
    one, two = Mixed(), Mixed()

    def function(ids, attention_mask, others, other_attention_mask):
        return attend(one, ids, attention_mask), attend(two, others, other_attention_mask)

    def attend(model, ids, mask):
        h = model.tokens(ids) * mask[..., None]
        h = packc.ops.causal_conv1d(h, model.taps)
        visible = mask.bool()[:, None, None] & torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        return F.scaled_dot_product_attention(h[:, None], h[:, None], h[:, None], visible)[:, 0]

    fast = torch.compile(function, backend="packc", options={**DEBUG, "packc.strict": False})
    for rows, others in ((RIGHT, LONGER), (HOLE, LONGER), (RIGHT, [row + "00" for row in HOLE])):
        given = [each for rows in (rows, others) for each in answers(rows).values()]
        for got, want, real in zip(fast(*given), function(*given), given[1::2], strict=True):
            torch.testing.assert_close(got[real == 1], want[real == 1], rtol=1e-5, atol=1e-5)


def test_each_may_have_documents_in_its_rows():
    model = PlainLM()

    def logits(input_ids, attention_mask, position_ids):
        return model.head(model.hidden(input_ids, attention_mask) * position_ids.cos()[..., None])

    def function(chosen, rejected):
        return logits(**chosen), logits(**rejected)

    fast = torch.compile(function, backend="packc", options=DEBUG)
    for number, (rows, others) in enumerate((([[8], [8]], [[10], [10]]), ([[3, 5], [8]], [[10], [2, 7, 1]]))):
        batch = [
            {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions(each)}
            for each in (rows, others)
            for ids in [torch.randint(1, 32, (2, sum(each[0])))]
        ]
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            got = fast(*batch)
        for result, given, each in zip(got, batch, (rows, others), strict=True):
            want = alone(
                lambda ids: logits(ids, torch.ones_like(ids), torch.arange(ids.shape[1])[None]),
                given["input_ids"],
                each,
            )
            torch.testing.assert_close(result, want, rtol=1e-4, atol=1e-4)
    with packc.documents(seq_idx=torch.zeros(2, 8, dtype=torch.int32)), pytest.raises(packc.NotPacked, match="several"):
        fast(*batch)


def test_documents_around_a_call_are_said_of_each():
    fast, ones = torch.compile(towers, backend="packc", options=DEBUG), [[8], [8]]
    x, mask, y, other = torch.randn(2, 8, 4), torch.ones(2, 8), torch.randn(2, 10, 4), torch.ones(2, 10)
    for rows, others in ((ones, [[10], [10]]), ([[3, 5], [8]], [[10], [2, 7, 1]]), (ones, [[4, 6], [10]])):
        said = {"x_attention_mask": numbers(rows), "y": numbers(others)}
        with packc.documents(seq_idx={name: each for name, each in said.items() if each.any()} or said):
            got = fast(x, mask, y, other)
        for result, given, each in zip(got, (x, y), (rows, others), strict=True):
            torch.testing.assert_close(result, alone(mix, given, each))
    for name in ("labels", "attention_mask"):
        with (
            packc.documents(seq_idx={name: numbers(rows)}),
            pytest.raises(ValueError, match=f"'{name}' is of 0 packed"),
        ):
            fast(x, mask, y, other)


def test_one_name_may_not_be_of_several_sequences():
    def function(chosen, rejected):
        return mix(chosen["x"] * chosen["mask"][..., None]), mix(rejected["x"] * rejected["mask"][..., None])

    batch = [{"x": torch.randn(2, 8, 4), "mask": torch.ones(2, 8)} for _ in range(2)]
    fast = torch.compile(function, backend="packc", options={**DEBUG, "packc.mask": ["chosen.mask", "rejected.mask"]})
    with (
        packc.documents(cu_seqlens={"mask": torch.tensor([0, 3, 16])}),
        pytest.raises(ValueError, match="of 2 packed"),
    ):
        fast(*batch)


def test_features_are_taken_along_an_axis_in_each():
    """The number of the first one's tokens is unknown in the graph in which the second one is found."""

    def function(x, x_attention_mask, y, y_attention_mask):
        made = towers(x, x_attention_mask, y, y_attention_mask)
        return tuple(each.take_along_dim(each.argsort(-1)[..., :1], 2) for each in made)

    given = inputs(RIGHT, OTHER)
    got, want = torch.compile(function, backend="packc", options=DEBUG)(*given), function(*given)
    for result, expected, real in zip(got, want, given[1::2], strict=True):
        torch.testing.assert_close(result[real == 1], expected[real == 1])
