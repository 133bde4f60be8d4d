"""``kernels``: a test that takes it runs on every implementation of the ops, each on its device."""

import pytest
from implementations import implementation

IMPLEMENTATIONS = ["reference", "cpu", "triton", pytest.param("gpu", marks=pytest.mark.gpu)]


@pytest.fixture(params=IMPLEMENTATIONS)
def kernels(request):
    with implementation(request.param):
        yield request.param
