"""A rank keeps its part of a stream alive, and little else."""

import pytest
from mixers import MIXERS
from sharded_work import peak

QUICK = "linear_attention"


@pytest.mark.parametrize(
    "name", [name if name == QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MIXERS]
)
def test_a_rank_of_four_has_a_fourth_of_the_activations(ranks, name):
    for stream in ([0, 16384], [*range(0, 16385, 8)]):
        (whole,) = ranks.run(peak, 1, name, stream)
        assert max(ranks.run(peak, 4, name, stream)) < (1 / 4 + 1 / 10) * whole
