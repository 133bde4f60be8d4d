import gc
import os

import pytest
import torch

# Before any kernel is defined: without a GPU, Triton kernels are interpreted on CPU tensors.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    from interpreter import prepare_language_once_a_launch

    prepare_language_once_a_launch()

# Collections look at all that torch has loaded, again and again: an eighth of the time.
gc.set_threshold(100_000, 50, 100)


def pytest_addoption(parser):
    parser.addoption("--thorough", action="store_true", help="also what repeats quicker tests in other cases")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--thorough"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: only with --thorough"))


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
