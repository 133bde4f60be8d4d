"""The steps that a GPU is asked, at tiny sizes on the CPU; and what is compiled for them without one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import importable
import plan
import pytest

GPU = Path(plan.__file__).parent


def run(out, *arguments):
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)  # steps choose for themselves
    ran = subprocess.run(
        [GPU / "run.sh", "--dry", out, "500", *arguments], capture_output=True, text=True, env=environment, timeout=600
    )
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()], ran.stdout


def assert_all_right(found, steps):
    assert [facts for facts in found if facts.get("ok") is False or facts.get("ended", "done") != "done"] == []
    told = {facts["step"] for facts in found if facts.get("ok") or "line" in facts}
    assert set(steps) <= told


def test_quick_steps_run_and_find_all_right(tmp_path):
    found, _ = run(tmp_path, "--steps", "card", "correct", "times")
    assert_all_right(found, ["card", "correct", "times"])
    checked = {facts["case"] for facts in found if facts["step"] == "correct" and "case" in facts}
    assert {f"{op} bf16 packed long" for op in (*plan.PRODUCTS, *plan.SCANS)} <= checked


@pytest.mark.slow
def test_all_steps_run_in_order_and_find_all_right(tmp_path):
    found, printed = run(tmp_path)
    names = [step.name for step in plan.steps(dry=True)]
    assert list(dict.fromkeys(facts["step"] for facts in found)) == names
    idle = {facts["step"] for facts in found if "needless" in facts or "skipped" in facts}
    # Of the ways around a compiler none is needed; there are no peers and no tests for a GPU here. Somebody may have
    # laid out what travels.
    needless = {"cubins", *plan.VARIANTS}
    assert needless <= idle <= needless | {"compile", *(name for name in names if name.endswith("newer ptxas"))}
    assert_all_right(found, set(names) - idle - {"tests", "peers"})
    assert len(printed.splitlines()) <= 25
    assert len(list(tmp_path.iterdir())) <= 8


def prebuild(folder, *arguments):
    scratch = folder / "scratch"
    if not scratch.exists():
        scratch.mkdir(parents=True)
        importable.lay_out_packc(scratch / "packc")
    environment = os.environ | {
        "PYTHONPATH": str(scratch / "packc"),
        "PACKC_GPU_SCRATCH": str(scratch),
        "TRITON_CACHE_DIR": str(folder / "triton"),
    }
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, GPU / "prebuild.py", "--jobs", "1", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def test_kernels_compiled_without_a_gpu_are_found_where_their_cache_is_taken(tmp_path):
    code, (here,) = prebuild(tmp_path / "here", "--here", "--only", "pack")
    assert (code, here["ok"], here["missed"] == here["kernels"] > 0) == (0, True, True)
    there = tmp_path / "there"
    there.mkdir()
    shutil.move(tmp_path / "here" / "triton", there / "triton")
    assert prebuild(there, "--check", "--only", "pack")[1][0]["missed"] > 0  # the cache names its old place
    importable.move_cache(there / "triton")
    code, (check,) = prebuild(there, "--check", "--only", "pack")
    assert (code, check["missed"], check["kernels"]) == (0, 0, here["kernels"])


@pytest.mark.slow
def test_everything_that_the_steps_launch_compiles_without_spills(tmp_path):
    code, units = prebuild(tmp_path, "--here")
    assert [facts for facts in units if not facts["ok"]] == []
    assert code == 0
    assert {facts["case"] for facts in units} == {*plan.PRODUCTS, *plan.SCANS, "models", "pack"}
