"""Compiled, a step is two graphs, the same on every rank and for every cut, with its collectives in sight."""

import pytest
import torch
from mixers import MIXERS
from sharded_work import Cut, graphs, opcheck, said_of, worst_errors

# No two sizes of the first are equal, which a compiler would take for more than chance, and no shard has less than 16
# tokens, for which linear_scan has a graph of its own, plan or not.
CUTS = [
    Cut([0, 2, 5, 5, 9, 12, 41, 41, 55, 60], [0, 17, 36, 60]),
    Cut([0, 60, 61, 80, 90], [0, 16, 42, 90]),
    Cut([0, 16, 50, 64], [0, 16, 40, 64]),
    Cut([0, 7, 18, 43, 67], [0, 18, 43, 67]),
]
QUICK = [("selective_scan", "all_gather")]
ALL = [(name, exchange) for name in MIXERS for exchange in ("all_gather", "ring", "doubling")]


@pytest.mark.parametrize(
    ("name", "exchange"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in QUICK)]
)
def test_one_graph_serves_all_ranks_and_cuts(ranks, name, exchange):
    found = ranks.run(graphs, 3, name, exchange, CUTS)
    for _, worst in found:
        assert max(worst.values()) < 1e-10, worst
    texts = [texts for texts, _ in found]
    assert len(texts[0]) == 2
    assert texts[0] == texts[1] == texts[2]


def test_a_plan_tells_its_mixers_of_documents_and_no_other(ranks):
    for said in ranks.run(said_of, 2, False):
        assert not said
    for (refusal,) in ranks.run(said_of, 2, True):
        assert refusal.startswith("packc cannot keep the documents that cu_seqlens")


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["all_gather", "doubling"])
@pytest.mark.parametrize("name", ["causal_conv1d", "selective_scan", "gated_delta_rule"])
def test_inductor_gives_the_same(ranks, name, exchange):
    for found in ranks.run(worst_errors, 3, name, CUTS, [exchange], torch.float32, "inductor", timeout=500):
        assert max(found.values()) < 1e-5, found


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXERS)
def test_opcheck(ranks, name):
    ranks.run(opcheck, 3, name)
