"""``kernels``: a test that takes it runs on every implementation of the ops, each on its device."""

import pytest
from budget import runs_by_default
from implementations import implementation
from mixers import MIXERS

IMPLEMENTATIONS = ["reference", "cpu", "triton", pytest.param("gpu", marks=pytest.mark.gpu)]


@pytest.fixture(params=IMPLEMENTATIONS)
def kernels(request):
    test, module = request.node.originalname, request.module.__name__.split(".")[-1]
    mixer = request.node.callspec.params.get("mixer") if module == "test_mixers" else None
    name = next((name for name, each in MIXERS.items() if each is mixer), None)
    thorough = request.config.getoption("--thorough")
    if request.param == "triton" and not thorough and not runs_by_default(module, test, name):
        pytest.skip("slow to interpret: only with --thorough")
    with implementation(request.param):
        yield request.param
