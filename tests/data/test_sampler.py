"""Batches of documents: each once, within the budget, as many on every rank; and they can be gone on with anywhere."""

from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from packc.data import PackingBatchSampler, PackingCollator
from packc.data.measure import log_normal, measure

some = settings(max_examples=60, deadline=None, derandomize=True)
LENGTHS = log_normal(3000, 1024, median=120)


def of_ranks(lengths, budget, world_size, **options):
    options["world_size"] = world_size
    return [list(PackingBatchSampler(lengths, budget, rank=n, **options)) for n in range(world_size)]


def measured(lengths, budget, **options):
    return measure(lengths, budget, world_size=4, progress=lambda steps, documents: steps, **options)


@some
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=80),
    budget=st.integers(40, 90),
    world_size=st.integers(1, 5),
    window=st.integers(1, 100),
    balance=st.sampled_from(["tokens", "attention"]),
    drop_last=st.booleans(),
)
def test_every_document_comes_within_the_budget_and_ranks_take_as_many_steps(
    lengths, budget, world_size, window, balance, drop_last
):
    options = {"window": window, "balance": balance, "drop_last": drop_last}
    ranks = of_ranks(lengths, budget, world_size, **options)
    assert len(set(map(len, ranks))) == 1
    batches = [batch for rank in ranks for batch in rank]
    assert all(batch and sum(lengths[n] for n in batch) <= budget for batch in batches)
    read = sorted(n for batch in batches for n in batch)
    if drop_last:
        assert len(set(read)) == len(read)
    else:
        assert set(read) == set(range(len(lengths)))
        assert len(read) - len(lengths) < world_size


def test_a_log_normal_corpus_wastes_less_than_a_hundredth():
    for budget in (2048, 8192):
        lengths = log_normal(60_000, budget)
        found = measured(lengths, budget, window=8192, balance="tokens")
        assert found.waste < 0.01
        assert found.straggling["tokens"] < 0.01


def test_balanced_attention_costs_no_more_tokens_and_lets_ranks_wait_less():
    by = {balance: measured(LENGTHS, 1024, window=3000, balance=balance) for balance in ("tokens", "attention")}
    assert by["attention"].waste == by["tokens"].waste
    assert by["attention"].straggling["attention"] < by["tokens"].straggling["attention"] / 3


def test_epochs_have_orders_of_their_own_and_seeds_repeat_them():
    sampler, again = (PackingBatchSampler(LENGTHS, 1024, window=500, seed=3) for _ in range(2))
    first, second = list(sampler), list(sampler)
    assert first != second
    again.set_epoch(1)
    assert list(again) == second
    again.set_epoch(0)
    assert list(again) == first
    assert list(PackingBatchSampler(LENGTHS, 1024, window=500, seed=4)) != first


def test_an_iteration_that_was_left_begins_anew():
    sampler = PackingBatchSampler(LENGTHS, 1024, window=500)
    assert list(islice(sampler, 5)) == list(islice(sampler, 5))


@pytest.mark.parametrize("steps", [0, 1, 40, 150])
def test_a_loaded_state_goes_on_where_it_was(steps):
    options = {"window": 500, "rank": 1, "world_size": 2}
    sampler = PackingBatchSampler(LENGTHS, 1024, **options)
    whole = list(sampler)
    sampler.set_epoch(0)
    assert len(whole) > 150
    iterator = iter(sampler)
    for _ in range(steps):
        next(iterator)
    resumed = PackingBatchSampler(LENGTHS, 1024, **options)
    resumed.load_state_dict(sampler.state_dict())
    resumed.set_epoch(0)  # as trainers do
    assert list(resumed) == whole[steps:]
    sampler.set_epoch(1)
    assert list(resumed) == list(sampler)


def test_a_state_of_other_arguments_is_refused():
    state = PackingBatchSampler(LENGTHS, 1024).state_dict()
    with pytest.raises(ValueError, match="another sampler: it had {'budget': 1024}"):
        PackingBatchSampler(LENGTHS, 2048).load_state_dict(state)


def test_the_number_of_batches_is_known_without_losing_ones_place():
    sampler = PackingBatchSampler(LENGTHS, 1024, window=700)
    iterator = iter(sampler)
    next(iterator)
    assert len(sampler) == 1 + sum(1 for _ in iterator)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": []}, "no documents"),
        ({"lengths": [3, 0]}, r"lengths\[1\] is 0"),
        ({"lengths": torch.tensor([3, 9])}, r"lengths\[1\] is 9, not from 1 to the budget of 8 tokens"),
        ({"balance": "rows"}, "balance must be one of"),
        ({"window": 0}, "window must be"),
        ({"rank": 1}, "go together"),
        ({"rank": 2, "world_size": 2}, "rank must be from 0 to"),
    ],
)
def test_arguments_out_of_range_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        PackingBatchSampler(**{"lengths": [1, 2, 3], "budget": 8, **arguments})


def test_a_loader_gives_batches_near_the_budget():
    documents = [{"input_ids": list(range(1, length + 1))} for length in LENGTHS[:400]]
    sampler = PackingBatchSampler(LENGTHS[:400], 1024)
    loader = DataLoader(documents, batch_sampler=sampler, collate_fn=PackingCollator())
    tokens = [int(batch["attention_mask"].sum()) for batch in loader]
    assert sum(tokens) == sum(LENGTHS[:400])
    assert sorted(tokens)[1] > 0.98 * 1024
