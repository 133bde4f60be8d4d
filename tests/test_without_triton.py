"""Triton does not exist everywhere: without it packc imports, packs and says what it cannot do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKS = """
import warnings
import torch, packc
from harness import RIGHT, batch_of, tiny_mamba
from packc import config

x = torch.rand(1, 4, 2, requires_grad=True)
packc.ops.causal_conv1d(x, torch.rand(2, 3)).sum().backward()
assert x.grad is not None
with config.patch(kernels="triton"):
    try:
        packc.ops.linear_scan(x, x)
    except RuntimeError as error:
        print(error)
"""

# A triton that fails otherwise than by ImportError keeps torch's own Dynamo from importing.
PACKS = """
report = packc.explain(tiny_mamba(layers=1))(**batch_of(RIGHT))
assert [mixer.packed for mixer in report.mixers] == [True, True], report
"""


@pytest.mark.parametrize("failure", ["ImportError('no such thing')"])
def test_without_triton(tmp_path, failure):
    (tmp_path / "triton.py").write_text(f"raise {failure}")
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": path, "PACKC_KERNELS": "reference"}
    run = subprocess.run(
        [sys.executable, "-c", WORKS + (PACKS if failure.startswith("ImportError") else "")],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert run.returncode == 0, run.stderr
    said = failure.replace("('", ": ").replace("')", "")
    assert run.stdout.strip() == f'packc.config.kernels = "triton", but triton cannot be imported: {said}'


def test_importing_packc_imports_none_of_its_triton_kernels():
    code = "import sys, packc; print([name for name in sys.modules if 'packc' in name and '.triton_' in name])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "['packc.ops.triton_presence']"
