"""What is taken along arrives: compiled kernels under new paths, peers, a compiler; and packc, never installed."""

import hashlib
import json
import lzma
import os
import subprocess
import sys
import zipfile

import child
import importable
import prebuild
import pytest
import stand_in
import travel
import triton
from triton.runtime import cache


@pytest.fixture
def taken_along(tmp_path, monkeypatch):
    folder = tmp_path / "travel"
    folder.mkdir()
    monkeypatch.setattr(importable, "TRAVEL", folder)
    monkeypatch.setattr(travel, "TRAVEL", folder)
    return folder


def write_cache(folder):
    kernel = folder / "KEY"
    kernel.mkdir(parents=True)
    (kernel / "k.cubin").write_bytes(b"\x7fELF")
    (kernel / "__grp__k.json").write_text(json.dumps({"child_paths": {"k.cubin": str(kernel / "k.cubin")}}))
    return folder


def test_compiled_kernels_are_listed_where_they_arrive(taken_along, tmp_path):
    cache = write_cache(tmp_path / "here")
    travel.lay_out_cache(cache)
    there = importable.unpack_cache(tmp_path / "there")
    listed = json.loads((there / "KEY" / "__grp__k.json").read_text())["child_paths"]
    assert listed == {"k.cubin": str(there / "KEY" / "k.cubin")}
    assert (there / "KEY" / "k.cubin").read_bytes() == b"\x7fELF"


def test_too_much_to_take_along_is_refused(taken_along, tmp_path, monkeypatch):
    monkeypatch.setattr(travel, "BYTES", 10)
    with pytest.raises(SystemExit, match="too much"):
        travel.lay_out_cache(write_cache(tmp_path / "here"))


def test_peers_and_ptxas_arrive_and_packc_is_imported_from_the_clone(taken_along, tmp_path):
    with zipfile.ZipFile(taken_along / "peer-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("peer/__init__.py", "")
    (taken_along / "ptxas.xz").write_bytes(lzma.compress(b"#!/bin/sh\necho 13.5\n"))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    environment = importable.environment(scratch, dry=False)
    assert subprocess.check_output([environment["PACKC_GPU_PTXAS"]], text=True) == "13.5\n"
    assert os.listdir(environment["PACKC_GPU_PEERS"]) == ["peer"]
    code = "import importlib.machinery as m; print(m.PathFinder.find_spec('packc').origin)"
    origin = subprocess.check_output([sys.executable, "-S", "-c", code], text=True, env=environment, cwd=tmp_path)
    assert origin.strip() == str(scratch / "packc" / "packc" / "__init__.py")
    assert (scratch / "packc" / "packc" / "ops" / "__init__.py").samefile(importable.ROOT / "ops" / "__init__.py")


def test_without_anything_taken_along_there_are_no_paths_to_it(taken_along, tmp_path):
    environment = importable.environment(tmp_path, dry=True)
    assert (environment["PACKC_GPU_PTXAS"], environment["PACKC_GPU_PEERS"]) == ("", "")


def test_kernels_are_kept_under_the_key_of_another_pythons_triton(tmp_path):
    wheel = tmp_path / f"triton-{triton.__version__}-cp399-cp399-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("triton/_C/libtriton.so", b"another")
    here, there = cache.triton_key(), stand_in.key_under(wheel)
    differ = [(a, b) for a, b in zip(here.split("-"), there.split("-"), strict=True) if a != b]
    assert [b for _, b in differ] == [hashlib.sha256(b"another").hexdigest()]


def test_a_wheel_of_another_triton_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"triton-0.1-.* is not of triton {triton.__version__}"):
        stand_in.key_under(tmp_path / "triton-0.1-cp312-cp312-linux_x86_64.whl")


FINE = {"kernel": "k", "warps": 4, "hit": False, "registers": 255, "spilled": 0, "shared": 0}
DONE = child.Ending("done", 1.0)


@pytest.mark.parametrize(
    ("way", "kernels", "ending", "ok"),
    [
        (prebuild.SHIPPED, [FINE], DONE, True),
        (prebuild.SHIPPED, [FINE, FINE | {"spilled": 16}], DONE, False),
        ("without wgmma", [FINE | {"spilled": 16}], DONE, True),
        ("without wgmma", [FINE], child.Ending("exit status 1", 1.0), False),
        (prebuild.SHIPPED, [], DONE, False),
    ],
)
def test_what_does_not_compile_fails_and_what_ships_must_not_spill(way, kernels, ending, ok, capsys):
    assert prebuild._told(way, "ssd", kernels, ending, []) == ok
    assert json.loads(capsys.readouterr().out)["ok"] == ok
