"""First-fit-decreasing: every item once, no bin over its budget, and the bins of the plain algorithm."""

from hypothesis import given, settings
from hypothesis import strategies as st

from packc.data.bins import first_fit_decreasing

many = settings(max_examples=200, deadline=None, derandomize=True)


def plain(lengths, budget):
    bins = []
    for item in sorted(range(len(lengths)), key=lambda n: lengths[n], reverse=True):
        for each in bins:
            if sum(lengths[n] for n in each) + lengths[item] <= budget:
                each.append(item)
                break
        else:
            bins.append([item])
    return bins


@many
@given(lengths=st.lists(st.integers(0, 50), max_size=60), budget=st.integers(50, 120))
def test_it_is_the_plain_algorithm(lengths, budget):
    assert first_fit_decreasing(lengths, budget) == plain(lengths, budget)
