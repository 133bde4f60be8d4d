"""Streams are cut and put together again, and a training step on shards is that of one process."""

import pytest
import torch
from stream_work import (
    lightning,
    lightning_refusals,
    pairs_of_a_bound_group,
    step,
    step_on_both_axes,
    there_and_back,
    training_on_both_axes,
    whole_step,
    whole_training,
)


@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("compiled", [None, pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_unshard_undoes_shard_and_its_gradient_is_the_sum_over_ranks(ranks, size, compiled):
    found = ranks.run(there_and_back, size, compiled)
    total = sum(each["weights"] for each in found)
    for each in found:
        torch.testing.assert_close(each["whole"], each["x"], rtol=0, atol=0)
    grad = torch.cat([each["grad"] for each in found], 1)
    torch.testing.assert_close(grad, 2 * found[0]["x"] * total)
    if compiled is None:
        second = torch.cat([each["second"] for each in found], 1)
        torch.testing.assert_close(second, 2 * total)


@pytest.mark.parametrize(("size", "through_mesh"), [(1, False), (3, False), (4, False), (4, True)])
def test_a_step_is_that_of_one_process(ranks, size, through_mesh):
    loss, grads = whole_step()
    for got, of_rank in ranks.run(step, size, through_mesh):
        torch.testing.assert_close(got, loss)
        for name, grad in grads.items():
            torch.testing.assert_close(of_rank[name], grad, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("exchange", ["all_gather", "ring", "doubling"])
def test_data_and_sequence_parallel_at_once(ranks, exchange):
    (first, of_first), (second, of_second) = map(whole_step, range(2))
    found = ranks.run(step_on_both_axes, 4, exchange)
    names = [group for *_, group in found]
    assert names[0] == names[1]
    assert names[2] == names[3]
    for rank, (loss, grads, _) in enumerate(found):
        torch.testing.assert_close(loss, second if rank >= 2 else first)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, (of_first[name] + of_second[name]) / 2)


# ZeRO-1 has DDP around the model, too.
@pytest.mark.parametrize("how", [pytest.param("DDP", marks=pytest.mark.slow), "ZeRO-1", "FSDP2"])
def test_training_on_both_axes_is_that_of_one_process(ranks, how):
    loss, *whole = whole_training(3)
    for total, *found in ranks.run(training_on_both_axes, 4, how, 3):
        torch.testing.assert_close(total, loss)
        for got, want in zip(found, whole, strict=True):
            assert got.keys() == want.keys()
            torch.testing.assert_close(list(got.values()), list(want.values()))


def test_pairs_are_made_by_their_own_ranks_alone(ranks):
    """By NCCL, groups are split off one that is bound to a device, for which all of its ranks would have to call."""
    for found, device in ranks.run(pairs_of_a_bound_group, 4):
        assert found.flatten().tolist() == [1, 2, 3, 1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5]
        assert device.type == "cuda"


@pytest.mark.parametrize("size", [1, 3, 4])
def test_lightning_attention_is_what_lasp_says(ranks, size):
    for got, want in ranks.run(lightning, size):
        torch.testing.assert_close(got, want)


def test_lightning_attention_says_what_does_not_fit(ranks):
    for rank, said in enumerate(ranks.run(lightning_refusals, 4)):
        tokens = [1, 2, 7, 4][rank]
        assert said[0] == (
            f"lightning_attn: q and k must be (B, H, N, K) and v (B, H, N, V), not q (2, 3, {tokens}, 4), "
            f"k (2, 2, {tokens}, 4), v (2, 3, {tokens}, 4)"
        )
        assert said[1] == "lightning_attn: slopes must be (H,) with H = 3, not (2,)"
        assert said[2].startswith("lightning_attn: q has 5 tokens, which are not those of Plan(")
