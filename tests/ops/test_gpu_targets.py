"""Every Triton kernel compiles for every GPU packc names, keeps its values in registers and fits the shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_launches import CALLS
from gpu_targets import CHIPS, SPILLS_ALLOWED, few


@pytest.mark.parametrize("op", CALLS)
def test_kernels_compile_without_spills(op, pytestconfig):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, Path(__file__).with_name("gpu_targets.py"), op]
    if everything := pytestconfig.getoption("--thorough"):
        command.append("--all")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["chip"] for kernel in kernels} == (set(CHIPS) if everything else {chip for _, chip in few(op)})
    spilled = [kernel for kernel in kernels if kernel["spilled"] > SPILLS_ALLOWED]
    too_large = [kernel for kernel in kernels if kernel["shared_memory"] > kernel["limit"]]
    assert (spilled, too_large) == ([], [])


def test_no_chip_is_left_out():
    assert {chip for op in CALLS for _, chip in few(op)} == set(CHIPS)
