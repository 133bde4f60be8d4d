"""``kernels``: a test that takes it runs on every implementation of the ops, each on its device."""

import pytest
from implementations import implementation

# Interpreted kernels pass what all mixers promise, and run on large heads; these modules' own tests add some minutes.
SLOW_TO_INTERPRET = ("test_gated_delta_rule", "test_linear_attention", "test_linear_scan", "test_ssd")
ALWAYS = ("test_any_size_of_heads", "test_any_trailing_shape", "test_is_linear_attention_bit_for_bit")

IMPLEMENTATIONS = ["reference", "cpu", "triton", pytest.param("gpu", marks=pytest.mark.gpu)]


@pytest.fixture(params=IMPLEMENTATIONS)
def kernels(request):
    slow = request.param == "triton" and request.module.__name__.split(".")[-1] in SLOW_TO_INTERPRET
    if slow and request.node.originalname not in ALWAYS and not request.config.getoption("--thorough"):
        pytest.skip("slow to interpret: only with --thorough")
    with implementation(request.param):
        yield request.param
