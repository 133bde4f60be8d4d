"""A mixer on shards gives what it gives on the whole stream: results, states, and all gradients."""

import pytest
import torch
from mixers import MIXERS
from sharded_work import Cut, chain, collectives, leaks, random_cut, worst_errors

ALWAYS = ["all_gather", "ring", "doubling", "auto"]
# Shards shorter than a convolution's window: what it sees comes from several ranks.
SHORT = Cut([0, 1, 9, 9, 12], [0, 3, 4, 5, 12])
# No document is on more than two ranks.
NEAR = Cut([0, 3, 12, 12, 17, 20], [0, 5, 14, 18, 20])
# No document is cut; a rank has none, empty ones lie between two.
APART = Cut([0, 0, 3, 8, 8, 8, 9, 15, 15], [0, 8, 8, 9, 15])


SLOW = pytest.mark.slow


@pytest.mark.parametrize("size", [pytest.param(1, marks=SLOW), pytest.param(2, marks=SLOW), 3, 4])
@pytest.mark.parametrize("name", MIXERS)
def test_any_cut_in_fp64(ranks, name, size):
    cuts = [random_cut(size, seed) for seed in range(6)]
    for found in ranks.run(worst_errors, size, name, cuts, ALWAYS, torch.float64):
        assert max(found.values()) < 1e-10, found


@pytest.mark.parametrize("name", MIXERS)
def test_the_kernels_in_fp32(ranks, name):
    for found in ranks.run(worst_errors, 4, name, [SHORT, NEAR], ALWAYS, torch.float32):
        assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("name", MIXERS)
def test_short_shards_and_neighbours(ranks, name):
    for found in ranks.run(worst_errors, 4, name, [SHORT, SHORT], ALWAYS, torch.float64):
        assert max(found.values()) < 1e-10, found
    for found in ranks.run(worst_errors, 4, name, [NEAR, NEAR, NEAR], [*ALWAYS, "neighbour"], torch.float64):
        assert max(found.values()) < 1e-10, found


@pytest.mark.parametrize("name", MIXERS)
def test_where_no_document_is_cut_nothing_travels(ranks, name):
    for found in ranks.run(worst_errors, 4, name, [APART, APART, APART], ["all_gather", "auto"], torch.float64):
        assert max(found.values()) < 1e-10, found
    for apart, cut in ranks.run(collectives, 4, name, [APART, NEAR]):
        assert apart == 0
        assert cut == 2


@pytest.mark.parametrize("name", [name for name in MIXERS if name != "causal_conv1d"])
def test_states_that_hardly_decay_reach_all_ranks(ranks, name):
    for error, of_one_hop in ranks.run(chain, 4, name):
        assert error < 1e-10
        assert of_one_hop > 0.01


@pytest.mark.parametrize("exchange", ["all_gather", *(pytest.param(e, marks=SLOW) for e in ("ring", "doubling"))])
@pytest.mark.parametrize("name", MIXERS)
def test_nothing_in_one_document_changes_another_by_one_bit(ranks, name, exchange):
    for found in ranks.run(leaks, 3, name, exchange):
        assert not found, found
