"""A loss outside of the compiled graph reads the position before a left-padded row's first token, which is padding."""

import contextlib
import os
import warnings

import pytest
import torch
from harness import BOTH, LEFT, RIGHT, batch_of, tiny_mamba
from rank_work import LMOfBlocks
from torch import nn
from torch.nn import functional as F

import packc

WHOLE = {"packc.inner": "aot_eager", "packc.strict": True}
EXACT = {**WHOLE, "packc.loss_outside": True}


class Broken(nn.Module):
    """Its loss comes after a graph break."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask, labels):
        logits = self.model(input_ids=ids, attention_mask=mask).logits
        torch._dynamo.graph_break()
        return next_token_loss(logits, labels)


def next_token_loss(logits, labels):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def returned_logits(options):
    model = tiny_mamba()
    if options:
        model.compile(backend="packc", options=options)
    return model, lambda ids, mask, labels: next_token_loss(model(input_ids=ids, attention_mask=mask).logits, labels)


def graph_break(options):
    broken = Broken(tiny_mamba())
    if options:  # the second graph has no mask, and nothing to pack
        broken.compile(backend="packc", options={**options, "packc.strict": False})
    return broken, broken


def blocks_one_by_one(options):
    torch.manual_seed(0)
    model = LMOfBlocks()
    for block in model.blocks if options else ():
        block.compile(backend="packc", options=options)
    return model, lambda *batch: model(*batch)[0]


def step(build, options, rows):
    torch.manual_seed(1)
    batch = batch_of(rows)
    model, loss_of = build(options)
    loss = loss_of(*batch.values())
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


@contextlib.contextmanager
def nothing_said():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="packc")
        yield


class Skipped(nn.Module):
    """Dynamo compiles what it calls, and leaves its own code as it is."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask):
        with open(os.devnull) as nothing:  # in a block that Dynamo cannot cut
            nothing.read()
            return self.model(input_ids=ids, attention_mask=mask).logits


def frame_that_is_skipped(options):
    skipped = Skipped(tiny_mamba())
    if options:
        skipped.compile(backend="packc", options={**options, "packc.strict": False})
    return skipped, lambda ids, mask, labels: next_token_loss(skipped(ids, mask), labels)


@pytest.mark.parametrize("build", [returned_logits, blocks_one_by_one])
@pytest.mark.parametrize("rows", [LEFT, BOTH])
def test_with_the_option_loss_and_gradients_are_stocks(build, rows):
    assert_stocks(build, EXACT, rows)


@pytest.mark.parametrize("build", [blocks_one_by_one, frame_that_is_skipped])
@pytest.mark.parametrize("rows", [LEFT, BOTH])
def test_blocks_that_are_compiled_alone_need_no_option(build, rows):
    assert_stocks(build, WHOLE, rows)


@pytest.mark.parametrize("rows", [LEFT, BOTH])
def test_after_a_graph_break_they_are_without_it(rows):
    assert_stocks(graph_break, WHOLE, rows)


def assert_stocks(build, options, rows):
    with nothing_said():
        actual = step(build, options, rows)
    for name, value in step(build, None, rows).items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=1e-5 * value.abs().max().item(), msg=name)


def test_without_it_a_warning_names_the_remedies():
    with pytest.warns(UserWarning, match="packc.loss_outside"):
        step(returned_logits, WHOLE, LEFT)


class Attending(LMOfBlocks):
    """Its blocks attend too, and packed attention would see the position before a row's first token."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(AttendingBlock(block) for block in self.blocks)


class AttendingBlock(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, h, mask):
        visible = mask[:, None, None, :].bool() & torch.ones(h.shape[1], h.shape[1], dtype=torch.bool).tril()
        heads = self.block(h, mask)[:, None]
        return h + F.scaled_dot_product_attention(heads, heads, heads, visible)[:, 0]


@pytest.mark.parametrize("outside", [None, False])
def test_blocks_with_attention_leave_padding_out_if_no_such_label_counts(outside):
    torch.manual_seed(0)
    model, batch = Attending(), batch_of(LEFT)
    batch["labels"][torch.arange(len(LEFT)), batch["attention_mask"].argmax(1)] = -100
    options = {"packc.inner": "aot_eager", "packc.loss_outside": outside}
    before = packc.stats()["whole_rows"]
    for block in model.blocks:
        block.compile(backend="packc", options=options)
    with contextlib.nullcontext() if outside is None else nothing_said():
        actual = model(*batch.values())[0]
    whole = packc.stats()["whole_rows"]
    assert (whole != before) == (outside is None)
    torch.manual_seed(0)
    torch.testing.assert_close(actual, Attending()(*batch.values())[0])


def test_who_says_no_is_not_warned():
    with nothing_said():
        step(returned_logits, {**WHOLE, "packc.loss_outside": False}, LEFT)


def test_nothing_is_said_where_no_such_label_can_count():
    model, batch = tiny_mamba(), batch_of(LEFT)
    compiled = torch.compile(model, backend="packc", options=WHOLE)
    with nothing_said():
        compiled(**batch).loss.backward()  # the graph has the labels
        for rows in (LEFT, RIGHT):
            batch = batch_of(rows)
            del batch["labels"]
            with torch.set_grad_enabled(rows is RIGHT):
                compiled(**batch)


def test_labels_in_the_graph_decide_alone_whatever_the_option():
    model, batch = tiny_mamba(), batch_of(LEFT)
    batch["labels"][:, :7] = -100
    compiled = torch.compile(model, backend="packc", options=EXACT)
    assert compiled(**batch).logits[batch["attention_mask"] == 0].eq(0).all()
