"""What is launched again without Triton's own path is what Triton would launch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def launches():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, Path(__file__).with_name("relaunches.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_what_triton_tells_apart_is_never_launched_with_another_kernel(launches):
    kernels = [by_triton[0] for by_triton, _, _ in launches]
    assert len(set(kernels)) == len(kernels)
    for by_triton, first, again in launches:
        assert first == by_triton
        assert again == by_triton
