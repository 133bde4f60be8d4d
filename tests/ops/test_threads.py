"""When the C++ kernels wake torch's threads."""

import subprocess
import sys
from pathlib import Path

import pytest

TINY = """
import os
import torch
from packc import ops

torch.set_num_threads(4)
q, k, v = torch.randn(3, 1, 64, 2, 16).unbind()
many = [torch.randn(1, 4096, 2, 16) for _ in range(3)]
offsets, gate = torch.tensor([0, 20, 64]), -torch.rand(1, 64, 2)
how = {"cu_seqlens": offsets}
before = len(os.listdir("/proc/self/task"))
ops.linear_attention(q, k, v, gate, **how)
ops.gated_delta_rule(q, k / 8, v, gate, torch.rand(1, 64, 2), **how)
ops.ssd(q, -gate, -torch.rand(2), k, v, **how)
ops.varlen_attention(q, k, v, **how)
ops.linear_scan(torch.rand(1, 64, 64), torch.randn(1, 64, 64), **how)
ops.causal_conv1d(torch.randn(1, 64, 64), torch.randn(64, 4), **how)
assert (after := len(os.listdir("/proc/self/task"))) == before, f"{after - before} threads have been started"
ops.linear_attention(*many)
assert len(os.listdir("/proc/self/task")) > before
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted as Linux lists them")
def test_calls_of_a_few_tokens_wake_no_threads():
    done = subprocess.run([sys.executable, "-c", TINY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
