"""A model, each of its blocks, or a step of training: wherever ``compile`` is called, it is packed, and right."""

import copy
import functools

import pytest
import torch
from harness import LEFT, RIGHT, PlainLM, batch_of
from rank_work import LMOfBlocks

import packc

OPTIONS = {"packc.inner": "aot_eager", "packc.strict": True}
PACKC = {"backend": "packc", "options": OPTIONS}


def whole(model, **how):
    return torch.compile(model, **PACKC, **how)


def in_place(model, **how):
    model.compile(**PACKC, **how)
    return model


def each_block(model):
    for block in model.blocks:
        block.compile(**PACKC | {"options": OPTIONS})
    return model


def a_method(model):
    model.forward = torch.compile(model.forward, **PACKC)
    return model


def a_step(model):
    """The forward and the loss in a function of the user's own; its backward is outside."""

    def step(ids, mask, labels):
        loss, logits = model(ids, mask, labels)
        return loss * 1.0, logits

    return torch.compile(step, **PACKC)


WAYS = {
    "model.compile()": (PlainLM, in_place),
    "fullgraph": (PlainLM, functools.partial(whole, fullgraph=True)),
    "dynamic": (PlainLM, functools.partial(whole, dynamic=True)),
    "not dynamic": (PlainLM, functools.partial(whole, dynamic=False)),
    "its forward": (PlainLM, a_method),
    "each block": (LMOfBlocks, each_block),
    "a step": (PlainLM, a_step),
}
QUICK = {"a step"}


def results(call, model, rows):
    model.zero_grad()
    loss, _ = call(*batch_of(rows).values())
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("name", [pytest.param(each, marks=[] if each in QUICK else pytest.mark.slow) for each in WAYS])
def test_it_packs_and_equals_eager(name):
    make, compile_it = WAYS[name]
    torch.manual_seed(0)
    model = make()
    plain = copy.deepcopy(model)
    call, before = compile_it(model), packc.stats()
    for rows in (RIGHT, LEFT):
        torch.manual_seed(0)
        expected = results(plain, plain, rows)
        torch.manual_seed(0)
        for got, want in zip(results(call, model, rows), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * want.abs().max().item())
    after = packc.stats()
    assert after["graphs"]["unpacked"] == before["graphs"]["unpacked"]
    assert after["padded_tokens"] - before["padded_tokens"] > after["tokens"] - before["tokens"]


@pytest.mark.slow
def test_a_whole_step_with_its_backward_inside_runs_right():
    """Dynamo breaks the graph at ``backward()``: what is before it is packed."""
    model = PlainLM()
    plain = copy.deepcopy(model)

    def step(ids, mask, labels):
        loss, _ = model(ids, mask, labels)
        loss.backward()
        return loss.detach()

    batch = batch_of(RIGHT)
    before = packc.stats()["steps"]
    loss = torch.compile(step, backend="packc", options={"packc.inner": "aot_eager"})(*batch.values())
    expected, _ = plain(*batch.values())
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for got, want in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-5, atol=1e-6)
    assert packc.stats()["steps"] == before + 1


@pytest.mark.slow
def test_max_autotune_under_inductor():
    model = PlainLM(hidden=4, layers=1)
    call = torch.compile(model, backend="packc", mode="max-autotune")  # torch takes no options beside it
    torch.manual_seed(0)
    expected = results(model, model, RIGHT)
    torch.manual_seed(0)
    with packc.config.patch(strict=True):
        for got, want in zip(results(call, model, RIGHT), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_an_exported_model_is_stocks_and_its_ops_packcs():
    """``torch.export`` asks no backend: padded, with packc's ops for a model that calls them."""
    model = PlainLM(layers=1)
    batch = tuple(batch_of(RIGHT).values())
    exported = torch.export.export(model, batch)
    names = {str(node.target) for node in exported.graph.nodes}
    assert "packc.causal_conv1d.default" in names
    assert not any(name.startswith(("packc.pack", "packc.unpack")) for name in names)
    torch.testing.assert_close(exported.module()(*batch)[0], model(*batch)[0])


@pytest.mark.slow
def test_regions_of_accelerate_pack_blocks_that_are_given_the_mask():
    compile_regions = pytest.importorskip("accelerate.utils").compile_regions
    model = LMOfBlocks()
    plain, before = copy.deepcopy(model), packc.stats()
    call = compile_regions(model, **PACKC | {"options": {"packc.inner": "aot_eager"}})
    torch.manual_seed(0)
    expected = results(plain, plain, RIGHT)
    torch.manual_seed(0)
    for got, want in zip(results(call, call, RIGHT), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * want.abs().max().item())
    after = packc.stats()
    assert after["steps"] - before["steps"] == len(model.blocks)
    assert after["graphs"]["packed"] - before["graphs"]["packed"] == 1  # of all blocks
