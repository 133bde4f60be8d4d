"""Every Triton kernel compiles for every GPU packc names, keeps its values in registers and fits the shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from gpu_launches import CALLS
from gpu_targets import CHIPS
from packaging.version import Version


def test_kernels_compile_without_spills():
    assert_sound(compiled(*CALLS), set(CHIPS))


@pytest.mark.slow
@pytest.mark.parametrize("op", CALLS)
def test_all_calls_in_all_configurations_do_for_all_chips(op):
    assert_sound(compiled(op, "--all"), set(CHIPS))


def compiled(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, Path(__file__).with_name("gpu_targets.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_sound(kernels, chips):
    assert {kernel["chip"] for kernel in kernels} == chips
    spilled = [kernel for kernel in kernels if kernel["spilled"] > kernel["may_spill"]]
    too_large = [kernel for kernel in kernels if kernel["shared_memory"] > kernel["limit"]]
    narrow = [kernel for kernel in kernels if kernel["wide_loads"] == 0 and reads_neighbours(kernel)]
    unsound = [kernel for kernel in kernels if kernel["wgmma"] and Version(triton.__version__) < Version("3.9")]
    assert (spilled, too_large, narrow, unsound) == ([], [], [], [])


def reads_neighbours(kernel):
    """Whether it should read several values at once: with or without documents, what a model hands over lies so."""
    apart = ("channel-first", "one channel", "token ids")
    one_a_thread = ("_document_of_token", "_tabulate", "_invert", "_pass_states", "final_states", "initial_state_grads")
    return not any(name in kernel["call"] for name in apart) and kernel["kernel"] not in one_a_thread
