"""``kernels``: a test that takes it runs on every implementation of the ops, each on its device."""

import budget
import pytest
from implementations import implementation
from mixers import MIXERS

IMPLEMENTATIONS = ["reference", "cpu", "triton", pytest.param("gpu", marks=pytest.mark.gpu)]


def pytest_configure(config):
    budget.thorough = config.getoption("--thorough")


@pytest.fixture(params=IMPLEMENTATIONS)
def kernels(request):
    test, module = request.node.originalname, request.module.__name__.split(".")[-1]
    mixer = request.node.callspec.params.get("mixer") if module == "test_mixers" else None
    name = next((name for name, each in MIXERS.items() if each is mixer), None)
    if not budget.runs_by_default(module, test, name):
        budget.skip_if_interpreted(request.param)
    with implementation(request.param):
        yield request.param
