"""Running a test on one implementation of the ops, on the device it is for."""

import contextlib

import pytest
import torch

from packc import config
from packc.ops import cpu_library
from packc.ops.tritonsrc.launch import interpreted


@contextlib.contextmanager
def implementation(name):
    """``"reference"``, ``"cpu"``, ``"triton"`` (interpreted, on CPU tensors) or ``"gpu"`` (Triton on CUDA tensors)."""
    if name == "cpu" and not cpu_library.load("selective_scan"):
        pytest.skip("no C++ compiler")
    if name == "triton" and not interpreted():
        pytest.skip("kernels are compiled here, not interpreted")
    if name == "gpu" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    forced = {"gpu": "triton"}.get(name, name)
    with torch.device("cuda" if name == "gpu" else "cpu"), config.patch(kernels=forced):
        yield


def opcheck(kernels, op, arguments):
    """torch's, whose tests of autograd and tracing say the same of every implementation: interpreted ones skip them."""
    tests = ("test_schema", "test_faketensor")
    if kernels != "triton":
        tests += ("test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op, arguments, test_utils=tests)
