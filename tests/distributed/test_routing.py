"""What plans say of documents and cuts is what one finds by looking at every token."""

from itertools import pairwise

from hypothesis import example, given, settings
from hypothesis import strategies as st

from packc.distributed import routing


@st.composite
def streams(draw, most=5):
    """Offsets of documents, and cuts; many cuts lie where documents end, and shards may be empty."""
    tokens = draw(st.integers(0, 12))
    stream = [0, *sorted(draw(st.lists(st.integers(0, tokens), max_size=4))), tokens]
    places = st.one_of(st.integers(0, tokens), st.sampled_from(stream))
    return stream, [0, *sorted(draw(st.lists(places, max_size=most - 1))), tokens]


def document_of_tokens(stream):
    return [n for n, (start, end) in enumerate(pairwise(stream)) for _ in range(start, end)]


def entering(owners, rank, cuts, from_left):
    """The tokens of other ranks whose document this rank's first (or last) token is in, nearest first."""
    low, high = cuts[rank : rank + 2]
    if low == high:
        return None
    token, others = (low, range(low - 1, -1, -1)) if from_left else (high - 1, range(high, cuts[-1]))
    return [other for other in others if owners[other] == owners[token]]


# What passes along the ranks, in tests: lists of tokens, each rank adding those of its segment at the end.


def segments(stream, cuts, to_right):
    """(tokens of the segment that goes on, whether what comes ends here), by rank."""
    for rank in range(len(cuts) - 1):
        mine, low, high = routing.route(stream, cuts, rank), *cuts[rank : rank + 2]
        if to_right:
            yield list(range(low + mine.begin, high)), mine.reset[rank]
        else:
            yield list(range(low + mine.end - 1, low - 1, -1)), mine.stop[rank]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(streams())
@example(([0, 4, 8], [0, 4, 8]))
@example(([0, 9], [0, 0, 2, 2, 5, 9]))
def test_what_passes_from_rank_to_rank_are_the_tokens_of_the_cut_document(case):
    stream, cuts = case
    owners = document_of_tokens(stream)
    for to_right in (True, False):
        passing = []
        order = list(enumerate(segments(stream, cuts, to_right)))
        for rank, (tokens, ends) in order if to_right else order[::-1]:
            expected = entering(owners, rank, cuts, to_right)
            mine = routing.route(stream, cuts, rank)
            enters = mine.enters if to_right else mine.leaves
            assert (enters is not None) == bool(expected)
            if expected:
                assert owners[expected[0]] == enters
                assert passing[::-1] == expected
            passing = tokens if ends else passing + tokens


@settings(max_examples=100, deadline=None, derandomize=True)
@given(streams(most=9))
def test_doubling_brings_what_passes_from_rank_to_rank(case):
    stream, cuts = case
    size = len(cuts) - 1
    for to_right in (True, False):
        line = list(segments(stream, cuts, to_right))
        line = line if to_right else line[::-1]
        ends = [end for _, end in line]
        one_by_one, passing = [], []
        for tokens, end in line:
            one_by_one.append(passing)
            passing = tokens if end else passing + tokens
        moving, before = [tokens for tokens, _ in line], [[] for _ in line]
        for step, distance in enumerate(routing.steps(size)):
            came = [moving[rank - distance] if rank >= distance else None for rank in range(size)]
            before = [
                before[rank] if routing.keeps(ends, rank)[step] else came[rank] + before[rank] for rank in range(size)
            ]
            moving = [tokens if end else before[rank] + tokens for rank, (tokens, end) in enumerate(line)]
        assert before == one_by_one


@settings(max_examples=100, deadline=None, derandomize=True)
@given(streams())
def test_every_document_ends_on_one_rank_and_its_tokens_are_where_they_were(case):
    stream, cuts = case
    ends = []
    for rank, (low, high) in enumerate(pairwise(cuts)):
        mine = routing.route(stream, cuts, rank)
        assert document_of_tokens(mine.cu_seqlens) == document_of_tokens(stream)[low:high]
        assert len(mine.cu_seqlens) == len(stream)
        here = {*document_of_tokens(stream)[low:high], *(n for n, end in enumerate(mine.ends) if end)}
        assert [*routing.held(stream, cuts, rank)] == sorted(here)
        ends.append(mine.ends)
        for n, (start, end) in enumerate(pairwise(stream)):
            if start < end and mine.ends[n]:
                assert low < end <= high
    assert all(sum(of_document) == 1 for of_document in zip(*ends, strict=True))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(streams())
def test_the_longest_span_is_that_of_some_document(case):
    stream, cuts = case
    rank_of = [rank for rank, (low, high) in enumerate(pairwise(cuts)) for _ in range(low, high)]
    spans = [rank_of[end - 1] - rank_of[start] if end > start else 0 for start, end in pairwise(stream)]
    document, hops = routing.longest_span(stream, cuts)
    assert hops == max(spans) == spans[document]
