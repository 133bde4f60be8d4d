import os

import pytest
import torch
import triton.runtime.interpreter
from interpreted_scan import tree_scan

# Before any kernel is defined: without a GPU, Triton kernels are interpreted on CPU tensors.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    triton.runtime.interpreter.ScanOps.generic_scan = tree_scan


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
