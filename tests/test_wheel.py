"""A wheel is all that packc needs: every package, every C++ source, and no module beside ``packc``."""

import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
SOURCES = ["packc", "passes", "ops", "pyproject.toml", "setup.py", "README.md", "LICENSE"]

PACKS = """
import torch, packc
from harness import RIGHT, batch_of, tiny_mamba
print(packc.__file__)
report = packc.explain(tiny_mamba(layers=1))(**batch_of(RIGHT))
assert [mixer.packed for mixer in report.mixers] == [True, True], report
packc.ops.linear_scan(torch.rand(1, 4, 2), torch.rand(1, 4, 2)).sum()
"""


def test_what_a_wheel_installs_packs_a_model(tmp_path):
    # A copy, for setuptools builds in place and would ship what an older build left there.
    clone, installed, empty = tmp_path / "clone", tmp_path / "installed", tmp_path / "empty"
    for directory in (clone, empty):
        directory.mkdir()
    for name in SOURCES:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, clone / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, clone)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(installed), str(clone)]
    subprocess.run(pip, check=True, capture_output=True, text=True, cwd=empty)

    assert [path.name for path in installed.iterdir() if path.suffix != ".dist-info"] == ["packc"]
    assert _files(installed / "packc") == {
        *(name for name in _files(clone / "packc")),
        *(f"{folder}/{name}" for folder in ("passes", "ops") for name in _files(clone / folder)),
    }

    run = subprocess.run(
        [sys.executable, "-c", PACKS],
        capture_output=True,
        text=True,
        cwd=empty,
        env=_environment(PYTHONPATH=f"{installed}:{REPOSITORY / 'tests'}", PACKC_KERNELS="reference"),
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str(installed / "packc" / "__init__.py")


def _environment(**more):
    import os

    return {**os.environ, **more}


def _files(folder):
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix in (".py", ".cpp", ".h") and "build" not in path.parts[len(folder.parts) :]
    }
