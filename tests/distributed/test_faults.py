"""What is wrong is said: on every rank, in the same words, and in time."""

from pathlib import Path

from stream_work import dies, mismatches, refusals
from two_ranks import on_two_ranks


def test_what_differs_between_ranks_is_said_on_all(ranks):
    found = ranks.run(mismatches, 3)
    assert found[0] == found[1] == found[2]
    assert found[0] == {
        **{what: f"ValueError: plan: cu_seqlens, cuts or exchange {differ([1])}" for what in ("cu_seqlens", "cuts")},
        "refused by one": f"ValueError: plan: cu_seqlens, cuts or exchange {differ([2])}",
        "exchange": f"ValueError: plan: cu_seqlens, cuts or exchange {differ([1, 2])}",
        "shapes": f"ValueError: linear_scan: plan, shapes or options {differ([2])}",
        "plans": f"ValueError: linear_scan: plan, shapes or options {differ([1])}",
        "tokens": f"ValueError: linear_scan: plan, shapes or options {differ([1, 2])}",
    }


def differ(ranks):
    return f"differ between ranks: {ranks} have not what rank 0 has"


SAID = {
    "no group": "ValueError: plan: rank {rank} is not in the group None",
    "not a group": "TypeError: plan: neither a DeviceMesh nor a process group: 'sequence'",
    "two dimensions": "ValueError: plan: a mesh must have one dimension, not (2, 2): take one of it, "
    'as in mesh["sequence"]',
    "falling": "ValueError: plan: cu_seqlens must rise from 0, not be [0, 3, 2]",
    "no document": "ValueError: plan: cu_seqlens must be N + 1 offsets of N >= 1 documents, not [0]",
    "fractions": "TypeError: plan: cu_seqlens must be integers, not [0, 2.5]",
    "cuts": "ValueError: plan: cuts must be 5 offsets from 0 to T = 3, not [0, 1, 3]",
    "exchange": "ValueError: plan: exchange must be one of auto, all_gather, ring, doubling, neighbour, not 'tree'",
    "far": 'ValueError: plan: exchange="neighbour" cannot serve document 0, tokens 0 to 9, which spans 4 ranks of '
    "cuts [0, 3, 5, 7, 9]",
    "both": "ValueError: cu_seqlens and plan: a plan has the documents, pass one of the two",
    "tokens": "ValueError: linear_scan: b has 5 tokens, which are not those of "
    "Plan(tokens {shard} of 14 in 5 documents, "
    'rank {rank} of 4, exchange="auto")',
    "whole": "ValueError: shard: x must be (1, 14, ...), not (1, 5, 2), with Plan(tokens {shard} of 14 in 5 documents, "
    'rank {rank} of 4, exchange="auto")',
}
SHARDS = ["0:1", "1:3", "3:10", "10:14"]


def test_arguments_that_do_not_fit_are_named_with_their_values(ranks):
    for rank, said in enumerate(ranks.run(refusals, 4)):
        second = "NotImplementedError: ops with a plan have no second derivative"
        assert said.pop("second derivative") == said.pop("of attention") == second
        assert "jvp" in said.pop("forward mode")
        assert said == {what: text.format(rank=rank, shard=SHARDS[rank]) for what, text in SAID.items()}


def test_a_rank_that_is_gone_is_an_error(tmp_path: Path):
    left, _ = on_two_ranks(dies, tmp_path, timeout=60)
    assert "onnection" in left or "peer" in left or "imed out" in left, left
