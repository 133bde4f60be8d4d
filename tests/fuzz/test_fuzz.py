"""A few random models in every run of the suite; ``python -m fuzz`` in tests/ tries thousands."""

from dataclasses import replace

import pytest

from fuzz.check import Wrong, check
from fuzz.compiled import check_compiled
from fuzz.generate import generate
from fuzz.shrink import shrunk
from packc import packed_call


@pytest.mark.parametrize("first", range(0, 40, 10))
def test_packed_models_are_eager_ones(first):
    kinds = [check(generate(seed), batches=3).kind for seed in range(first, first + 10)]
    assert kinds.count("packed") >= 4, kinds


def test_a_sequence_is_packed_beside_one_whose_packed_features_are_padded():
    assert check(generate(70004224)).kind == "packed"  # of how many tokens, F.pad asked


def test_a_fault_is_found_and_shrunk(monkeypatch):
    pack_batches = packed_call.pack_batches
    monkeypatch.setattr(
        packed_call, "pack_batches", lambda rows: pack_batches([replace(each, keep_left=None) for each in rows])
    )
    program = next(each for each in map(generate, range(10, 90)) if is_wrong(each))
    smaller, _ = shrunk(program, batches=4)
    assert len(smaller.lines) < len(program.lines)
    assert any(mixer in smaller.text for mixer in ("packc.ops", "scaled_dot_product_attention", "conv1d"))


def is_wrong(program):
    try:
        check(program)
    except Wrong:
        return True
    return False


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", range(0, 300, 20))
def test_compiled_models_are_eager_ones(first):
    for seed in range(first, first + 20):
        check_compiled(generate(seed))
