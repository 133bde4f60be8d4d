"""packc.config.kernels: what it forces runs, or raises."""

from types import SimpleNamespace

import pytest
import torch

from packc import config
from packc.ops import cpu_library, dispatch


def choose(x, kernels):
    with config.patch(kernels=kernels):
        return dispatch.choose("causal_conv1d", x)


def test_float64_always_takes_the_reference():
    x = torch.empty(1, dtype=torch.float64)
    assert [choose(x, kernels) for kernels in ("auto", "cpu", "triton", "reference")] == ["reference"] * 4


@pytest.mark.parametrize("kernels", ["cpu", "triton"])
def test_other_devices_take_the_reference_unless_a_kernel_is_forced(kernels):
    x = torch.empty(1, device="meta")
    assert choose(x, "auto") == "reference"
    with pytest.raises(ValueError, match=r"causal_conv1d got a torch\.float32 tensor on meta"):
        choose(x, kernels)


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_a_device_that_has_no_kernels_runs_the_reference_with_one_warning(kind):
    x = SimpleNamespace(
        dtype=torch.float32, device=SimpleNamespace(type=kind), is_cpu=False, is_cuda=False, is_meta=False
    )
    with pytest.warns(UserWarning, match=f"no kernels for {kind}, so the slower reference") as caught:
        assert [choose(x, "auto") for _ in range(3)] == ["reference"] * 3
    assert len(caught) == 1


def test_triton_runs_on_cpu_tensors_only_in_its_interpreter(monkeypatch):
    x = torch.empty(1)
    monkeypatch.setattr(dispatch, "interpreted", lambda: True)
    assert choose(x, "triton") == "triton"
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    with pytest.raises(ValueError, match="tensor on cpu; only under TRITON_INTERPRET=1"):
        choose(x, "triton")


@pytest.mark.parametrize("interpreted", [True, False])
def test_the_cpu_never_takes_triton_of_itself(monkeypatch, interpreted):
    monkeypatch.setattr(dispatch, "interpreted", lambda: interpreted)
    assert choose(torch.empty(1), "auto") != "triton"


def test_implementations_that_do_not_exist_raise():
    with pytest.raises(ValueError, match="cuda"):
        choose(torch.empty(1), "cuda")


def test_a_kernel_that_did_not_build_is_replaced_unless_it_is_forced(monkeypatch):
    monkeypatch.setattr(cpu_library, "_load_all", lambda: {"causal_conv1d": "no compiler"})
    assert choose(torch.empty(1), "auto") == "reference"
    with pytest.raises(RuntimeError, match="causal_conv1d did not build: no compiler"):
        choose(torch.empty(1), "cpu")
