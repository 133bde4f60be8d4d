"""Where a stream is cut so that ranks have equally much to do."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from packc.distributed.cuts import equal_work, work_of_tokens
from packc.passes.work import Pairs, Work


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 4), st.booleans(), st.data())
def test_no_rank_has_more_than_its_share_and_a_token(lengths, size, causal, data):
    offsets = [0, *itertools.accumulate(lengths)]
    if offsets[-1] < 2 * size:
        return
    window = data.draw(st.none() | st.integers(1, 9))
    work = Work(data.draw(st.integers(1, 50)), [Pairs(3, causal, window)])
    cuts = equal_work(offsets, size, work, least=2)
    of_token = work_of_tokens(offsets, work)
    assert (cuts[0], cuts[-1]) == (0, offsets[-1])
    for low, high in itertools.pairwise(cuts):
        assert high - low >= 2
        if high - low > 2:
            assert int(of_token[low:high].sum()) <= int(of_token.sum()) / size + 2 * int(of_token.max())


def test_work_counts_the_tokens_that_each_one_sees():
    seen = work_of_tokens([0, 3, 3, 7], Work(10, [Pairs(1, True, None)])) - 10
    assert seen.tolist() == [1, 2, 3, 1, 2, 3, 4]
    both_ways = work_of_tokens([0, 3, 7], Work(0, [Pairs(1, False, None)]))
    assert both_ways.tolist() == [3, 3, 3, 4, 4, 4, 4]
    window = work_of_tokens([0, 3, 7], Work(0, [Pairs(1, True, 2), Pairs(2, False, 2)]))
    assert window.tolist() == [1 + 4, 2 + 6, 2 + 4, 1 + 4, 2 + 6, 2 + 6, 2 + 4]


def test_without_attention_equal_work_is_equally_many_tokens():
    assert equal_work([0, 5, 12], 3, Work(7, []), least=2) == (0, 4, 8, 12)
