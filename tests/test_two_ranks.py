"""On two ranks with tokens of different number, gradients are those of one process that sees both batches."""

import pytest
import torch
from harness import PlainLM, tiny_mamba
from rank_work import LMOfBlocks, batches, ddp_gradients, fsdp_gradients, in_place, inside, outside, weighted_by_tokens
from two_ranks import on_two_ranks


def expected_gradients(model, batches):
    """Of the mean over ranks of each rank's loss."""
    for batch in batches:
        (model(*batch.values())[0] / len(batches)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same_gradients(got, expected):
    for gradients in got:
        for name, want in expected.items():
            torch.testing.assert_close(gradients[name], want, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: name + m)


@pytest.mark.parametrize(
    ("combine", "dynamic"),
    [
        (outside, None),
        *(
            pytest.param(combine, dynamic, marks=pytest.mark.slow)
            for combine in (outside, inside, in_place)
            for dynamic in (None, True)
            if (combine, dynamic) != (outside, None)
        ),
    ],
)
def test_ddp_averages_the_gradients_of_packed_ranks(tmp_path, combine, dynamic):
    got = on_two_ranks(ddp_gradients, tmp_path, combine, dynamic)
    torch.manual_seed(0)
    assert_same_gradients(got, expected_gradients(PlainLM(), batches()))


@pytest.mark.slow
@pytest.mark.parametrize("compile_blocks", [False, True])
def test_each_block_packs_under_fsdp(tmp_path, compile_blocks):
    got = on_two_ranks(fsdp_gradients, tmp_path, compile_blocks)
    torch.manual_seed(0)
    assert_same_gradients(got, expected_gradients(LMOfBlocks(), batches()))


@pytest.mark.slow
def test_with_num_items_in_batch_every_token_of_both_ranks_weighs_the_same(tmp_path):
    got = on_two_ranks(weighted_by_tokens, tmp_path)
    model = tiny_mamba(layers=1)
    together = {name: torch.cat([batch[name] for batch in batches()]) for name in batches()[0]}
    model(**together).loss.backward()
    assert_same_gradients(got, {name: p.grad for name, p in model.named_parameters()})
