"""``import packc`` costs little more than torch: what is heavy comes when it is needed, and packc's part with it."""

import subprocess
import sys

import pytest

HEAVY = {"triton", "torch._dynamo", "torch._inductor", "transformers"}

WORKS = """
import packc, torch
from packc.frontends.tracing_backend import packc_is_tracing
from torch.utils.flop_counter import FlopCounterMode

x = torch.ones(1, 8, 4)
with FlopCounterMode(display=False) as counter:
    packc.ops.linear_scan(x, x)
assert counter.get_total_flops() == 2 * 8 * 4

@torch.compile(backend=packc.backend, fullgraph=True, options={"packc.inner": "eager"})
def traced(x):
    return x + 1 if packc_is_tracing() else x

assert traced(x)[0, 0, 0] == 2
"""


@pytest.mark.parametrize(
    "before",
    [
        f"import sys, packc; heavy = {HEAVY} & set(sys.modules); assert not heavy, heavy",
        pytest.param("import torch._dynamo, torch.utils.flop_counter", marks=pytest.mark.slow),
    ],
)
def test_nothing_heavy_is_imported_and_what_comes_later_or_sooner_works(before):
    subprocess.run([sys.executable, "-c", before + WORKS], check=True)
