"""What packc tells on request: log lines through TORCH_LOGS, graphs in the structured trace."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import torch, packc
from harness import masks, RIGHT
def f(x, attention_mask):
    return packc.ops.causal_conv1d(x * attention_mask[..., None], torch.ones(4, 2))
def g(x):
    return packc.ops.causal_conv1d(x, torch.ones(4, 2))
for function, inputs in ((f, (torch.randn(3, 8, 4), masks(RIGHT))), (g, (torch.randn(3, 8, 4),))):
    torch.compile(function, backend="packc", options={"packc.inner": "aot_eager"})(*inputs)
"""


def test_logs_and_traces_show_the_graphs_before_and_after_and_why_one_is_not_packed(tmp_path):
    environment = {
        **os.environ,
        "TORCH_LOGS": "+packc",
        "TORCH_TRACE": str(tmp_path),
        "PYTHONPATH": str(Path(__file__).parent),
    }
    result = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "nodes into" in result.stderr
    assert "torch.ops.packc.unpack.default" in result.stderr
    assert "not packed: no (B, L) padding mask" in result.stderr
    trace = "".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert '"packc_before"' in trace
    assert '"packc_after"' in trace
    assert "torch.ops.packc.unpack.default" in trace
