"""What is wrong in one way only is found: by fp64, by calling again, by a NaN, in the middle of a long pack."""

import cases
import correct
import launching
import plan
import pytest
import torch

from packc import config
from packc.ops.selective_scan import triton_backward

CASE = cases.Case("linear_scan", "bf16", "packed")


@pytest.fixture
def spoil(monkeypatch):
    """``spoil(change)``: what kernels make is handed to ``change`` with the number of the call and the inputs."""

    def spoil(change):
        run, calls = cases.run, []

        def spoiled(mixer, tensors, *args, **kwargs):
            results = run(mixer, tensors, *args, **kwargs)
            if config.kernels != "reference":
                change(results, len(calls), tensors)
                calls.append(mixer)
            return results

        monkeypatch.setattr(cases, "run", spoiled)

    return spoil


def test_every_op_is_compiled_before():
    assert {*plan.PRODUCTS, *plan.SCANS} == cases.OPS.keys()


def test_nothing_is_found_where_nothing_is_wrong(spoil):
    spoil(lambda results, call, tensors: None)
    assert correct.short(CASE, dry=True)["ok"]
    assert correct.long_pack(CASE, dry=True)["ok"]


@pytest.mark.parametrize("value", [0.5, torch.nan])
def test_a_wrong_value(spoil, value):
    def change(results, call, tensors):
        results["db"].view(-1)[1] += value

    spoil(change)
    assert "db: " in correct.short(CASE, dry=True)["why"]


def test_other_bits_in_a_later_call(spoil):
    def change(results, call, tensors):
        if call == 2:
            results["out"].view(torch.int16).view(-1)[0] ^= 1

    spoil(change)
    assert correct.short(CASE, dry=True)["why"] == "out: other bits in another call"


def test_a_nan_that_travels(spoil):
    def change(results, call, tensors):
        if tensors["b"].isnan().any():
            results["da"][:, -1] = torch.nan

    spoil(change)
    assert correct.short(CASE, dry=True)["why"] == "da: touched by a NaN of another document"


@pytest.mark.parametrize("name", ["out", "da"])
@pytest.mark.parametrize("token", [-1, 512 // 2 - 1])
def test_a_wrong_value_deep_in_a_long_pack(spoil, name, token):
    def change(results, call, tensors):
        results[name][:, token] += 0.5

    spoil(change)
    assert f": {name}: " in correct.long_pack(CASE, dry=True)["why"]


def test_memory_that_nobody_wrote_is_nan():
    correct.poison_memory()
    try:
        x = torch.zeros(3)
        assert all(y.isnan().all() for y in (torch.empty(3), x.new_empty(3), torch.empty_like(x)))
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_choice_is_asked_for_in_the_environment(monkeypatch):
    monkeypatch.setattr(triton_backward, "_BLOCK_D", triton_backward._BLOCK_D)
    for name, value in plan.CHOICES["back by 64 channels"][1].items():
        monkeypatch.setenv(name, value)
    launching.as_asked()
    assert triton_backward._BLOCK_D == 64
