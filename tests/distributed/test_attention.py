"""Attention on shards gives what it gives on the whole stream, and only keys of its documents come."""

import pytest
import torch
from attention_work import leaks, received, worst_error, worst_error_of_scores
from sharded_work import Cut, random_cut


@pytest.mark.parametrize("size", [3, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 2, 4))])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_any_cut(ranks, size, dtype, tolerance):
    cuts = [random_cut(size, seed) for seed in range(8)]
    for worst in ranks.run(worst_error, size, cuts, dtype):
        assert worst < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_capped_scores_biases_and_sinks(ranks, dtype, tolerance):
    for worst in ranks.run(worst_error_of_scores, 3, [random_cut(3, seed) for seed in range(4)], dtype):
        assert worst < tolerance


def test_blocks_of_queries(ranks):
    cuts = [Cut([0, 20, 620], [0, 310, 620])]
    for worst in ranks.run(worst_error, 2, cuts, torch.float64):
        assert worst < 1e-10


def test_nothing_reaches_another_document(ranks):
    for found in ranks.run(leaks, 3):
        assert not found, found


def test_only_keys_of_documents_that_reach_in_come(ranks):
    cut = Cut([0, 2, 9, 12, 20], [0, 4, 7, 12, 20])
    assert ranks.run(received, 4, cut, True) == [0, 2, 5, 0]
    assert ranks.run(received, 4, cut, False) == [5, 4, 5, 0]


@pytest.mark.slow
def test_compiled(ranks):
    cuts = [Cut([0, 2, 5, 5, 21, 21, 26, 30], [0, 9, 19, 30]), Cut([0, 30, 31, 40, 45], [0, 2, 21, 45])]
    for worst in ranks.run(worst_error, 3, cuts, torch.float64, "aot_eager"):
        assert worst < 1e-10
