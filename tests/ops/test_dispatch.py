"""packc.config.kernels: what it forces runs, or raises."""

import pytest
import torch

from packc import config
from packc.ops import cpu_library, dispatch


def choose(x, kernels):
    with config.patch(kernels=kernels):
        return dispatch.choose("causal_conv1d", x)


def test_float64_always_takes_the_reference():
    x = torch.empty(1, dtype=torch.float64)
    assert [choose(x, kernels) for kernels in ("auto", "cpu", "reference")] == ["reference"] * 3


def test_other_devices_take_the_reference_unless_cpu_is_forced():
    x = torch.empty(1, device="meta")
    assert choose(x, "auto") == "reference"
    with pytest.raises(ValueError, match=r"causal_conv1d got a torch\.float32 tensor on meta"):
        choose(x, "cpu")


@pytest.mark.parametrize(("kernels", "error"), [("triton", NotImplementedError), ("cuda", ValueError)])
def test_implementations_that_do_not_exist_raise(kernels, error):
    with pytest.raises(error, match=kernels):
        choose(torch.empty(1), kernels)


def test_a_kernel_that_did_not_build_is_replaced_unless_it_is_forced(monkeypatch):
    monkeypatch.setattr(cpu_library, "_load_all", lambda: {"causal_conv1d": "no compiler"})
    assert choose(torch.empty(1), "auto") == "reference"
    with pytest.raises(RuntimeError, match="causal_conv1d did not build: no compiler"):
        choose(torch.empty(1), "cpu")
