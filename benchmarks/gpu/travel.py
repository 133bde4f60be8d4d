"""What a bare machine is given along, in ``travel/``: compiled kernels, peers in pure Python, a newer ptxas."""

from __future__ import annotations

import lzma
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from importable import TRAVEL

BYTES = 60_000_000  # of all of it
PEERS = ("fla-core", "flash-linear-attention")
PTXAS = ("nvidia-cuda-nvcc", "nvidia/*/bin/ptxas")
# mamba_ssm's Triton kernels: the package itself wants its CUDA extension as soon as it is imported.
MAMBA = ("mamba_ssm", ("mamba_ssm/ops/triton/", "mamba_ssm/utils/torch.py", "mamba_ssm/utils/determinism.py"))


def fetch(scratch: Path) -> Path:
    """Downloads what others have made; the ptxas, to compile with."""
    TRAVEL.mkdir(exist_ok=True)
    for old in TRAVEL.iterdir():
        old.unlink()
    for peer in PEERS:
        _download(peer, TRAVEL, "--only-binary=:all:")
    try:
        source = _download(MAMBA[0], scratch, "--no-binary=:all:")
    except subprocess.CalledProcessError:
        print(f"{MAMBA[0]} stays at home: pip asks its source for metadata, which takes setuptools, wheel and torch")
    else:
        _write_mamba(source, TRAVEL / "mamba_ssm_triton.whl")
    ptxas = _unpack_ptxas(_download(PTXAS[0], scratch, "--only-binary=:all:"), scratch / "ptxas")
    (TRAVEL / "ptxas.xz").write_bytes(lzma.compress(ptxas.read_bytes()))
    return ptxas


def _download(package: str, folder: Path, binary: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.iterdir())
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation", binary]
    # pip asks a source for its metadata; mamba_ssm's would look for nvcc.
    environment = os.environ | {"MAMBA_SKIP_CUDA_BUILD": "TRUE"}
    subprocess.run([*command, "-d", str(folder), package], check=True, env=environment)
    return next(iter(set(folder.iterdir()) - before))


def _write_mamba(source: Path, wheel: Path) -> None:
    with tarfile.open(source) as archive, zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as packed:
        folders = {"mamba_ssm/"}
        for member in archive.getmembers():
            name = member.name.partition("/")[2]
            file = archive.extractfile(member) if name.startswith(MAMBA[1]) and name.endswith(".py") else None
            if file is None:
                continue
            folders |= {f"{parent}/" for parent in Path(name).parents if str(parent) != "."}
            if not name.endswith("__init__.py"):
                packed.writestr(name, file.read())
        for folder in folders:
            packed.writestr(f"{folder}__init__.py", "")


def _unpack_ptxas(wheel: Path, file: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if Path(name).match(PTXAS[1]))
        file.write_bytes(archive.read(name))
    file.chmod(0o755)
    return file


def lay_out_cache(cache: Path) -> None:
    """Raises if all of it is too much to take along."""
    with tarfile.open(TRAVEL / "triton.tar.xz", "w:xz") as archive:
        for file in sorted(cache.glob("*/*")):
            if file.is_file() and file.name != "lock":
                archive.add(file, file.relative_to(cache))
    sizes = {file.name: file.stat().st_size for file in TRAVEL.iterdir()}
    print("travel:", ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sizes.items()), file=sys.stderr)
    if sum(sizes.values()) > BYTES:
        raise SystemExit(f"{sum(sizes.values()) / 1e6:.0f} MB are too much to take along")
