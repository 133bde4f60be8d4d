"""What is asked of Triton where it compiles badly for a chip."""

import os
from types import SimpleNamespace

import pytest
import triton
from triton.backends.compiler import GPUTarget

from packc.ops.gated_delta_rule import triton_forward as gated_delta_rule
from packc.ops.linear_attention import triton_forward as linear_attention
from packc.ops.selective_scan import triton_forward as selective_scan
from packc.ops.tritonsrc import chips, launch

HOPPER, AMPERE, BLACKWELL = (GPUTarget("cuda", arch, 32) for arch in (90, 80, 100))
AMD = GPUTarget("hip", "gfx942", 64)
WITH_PRODUCTS, WITHOUT = linear_attention._outputs.fn, selective_scan.walk.fn
FOUR, EIGHT = (triton.Config({}, num_warps=warps) for warps in (4, 8))


@pytest.fixture(params=[(3, 6), (3, 8)], ids=str)
def unsound(request, monkeypatch):
    monkeypatch.setattr(chips, "_RELEASE", request.param)
    monkeypatch.setattr(chips, "_SWITCHED", None)
    monkeypatch.setattr(chips._without_wgmma, "_warned", False)


@pytest.fixture
def sound(monkeypatch):
    monkeypatch.setattr(chips, "_RELEASE", (3, 9))
    monkeypatch.setattr(chips, "_SWITCHED", None)


def switched():
    return os.environ.get("DISABLE_MMA_V3")


def test_products_for_hopper_are_compiled_without_wgmma_and_the_remedy_is_named(unsound):
    with pytest.warns(UserWarning, match="Triton 3.9 is sound"), chips.compiling(WITH_PRODUCTS, HOPPER):
        assert switched() == "1"
    assert switched() is None
    assert chips.offered(WITH_PRODUCTS, [FOUR, EIGHT], [EIGHT], HOPPER) == [EIGHT]


@pytest.mark.filterwarnings("ignore:packc. triton")
def test_the_switch_stays_until_the_last_that_compiles_is_done(unsound):
    outer = chips.compiling(WITH_PRODUCTS, HOPPER)
    with outer:
        with chips.compiling(WITH_PRODUCTS, HOPPER):
            pass
        assert switched() == "1"
    assert switched() is None


@pytest.mark.parametrize("target", [AMPERE, BLACKWELL, AMD], ids=str)
def test_other_chips_are_compiled_for_as_ever(unsound, target):
    with chips.compiling(WITH_PRODUCTS, target):
        assert switched() is None


def test_kernels_without_products_are_left_alone(unsound):
    with chips.compiling(WITHOUT, HOPPER):
        assert switched() is None
    assert chips.offered(WITHOUT, [FOUR, EIGHT], [EIGHT], HOPPER) == [FOUR, EIGHT]


def test_who_asks_for_wgmma_gets_it_with_four_warps(unsound, monkeypatch):
    monkeypatch.setattr(chips, "_SWITCHED", "0")
    with chips.compiling(WITH_PRODUCTS, HOPPER):
        assert switched() is None
    assert chips.offered(WITH_PRODUCTS, [FOUR, EIGHT], [EIGHT], HOPPER) == [FOUR]


def test_amd_chips_are_offered_four_warps(sound):
    assert [config.num_warps for config in chips.offered(WITH_PRODUCTS, [FOUR, EIGHT], [EIGHT], AMD)] == [4]


@pytest.mark.parametrize("kernel", [WITH_PRODUCTS, WITHOUT])
def test_amd_chips_are_told_of_no_registers(sound, kernel):
    limited = triton.Config({"BLOCK": 8}, num_warps=2, num_stages=1, maxnreg=255)
    assert chips.offered(kernel, [limited], None, HOPPER) == [limited]
    (config,) = chips.offered(kernel, [limited], None, AMD)
    assert config.all_kwargs() == {"BLOCK": 8, "num_warps": 2, "num_ctas": 1, "num_stages": 1}


@pytest.mark.parametrize(("target", "handed"), [(AMD, {"x": 1}), (HOPPER, {"x": 1, "maxnreg": 128})])
def test_launches_say_maxnreg_where_it_is_known(sound, monkeypatch, target, handed):
    class Kernel:
        arg_names = ("x",)

        def __getitem__(self, grid):
            return lambda **arguments: heard.append(arguments)

    heard = []
    driver = SimpleNamespace(active=SimpleNamespace(get_current_target=lambda: target))
    monkeypatch.setattr(launch.triton.runtime, "driver", driver)
    monkeypatch.setattr(launch, "relaunches", lambda: False)
    launch._launch_here(Kernel(), (1,), None, {"x": 1, "maxnreg": 128})
    assert heard == [handed]


def test_a_sound_triton_is_left_alone(sound):
    with chips.compiling(WITH_PRODUCTS, HOPPER):
        assert switched() is None
    assert chips.offered(WITH_PRODUCTS, [FOUR, EIGHT], [EIGHT], HOPPER) == [FOUR, EIGHT]


def test_kernels_with_products_are_known_by_being_told_how_to_multiply():
    for module in (linear_attention, gated_delta_rule):
        assert chips.multiplies(module._outputs.fn)
    assert not chips.multiplies(selective_scan.walk.fn)
