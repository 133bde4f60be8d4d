"""The environment of the steps: packc from this clone, whether it is installed or not, and what travelled with it."""

from __future__ import annotations

import json
import lzma
import os
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
TRAVEL = Path(__file__).parent / "travel"  # made by prebuild.py


def environment(scratch: Path, dry: bool) -> dict[str, str]:
    """Paths stand in it under names of their own too: ``PACKC_GPU_...``."""
    lay_out_packc(scratch / "packc")
    paths = [scratch / "packc", os.environ.get("PYTHONPATH")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(str(path) for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        "PACKC_GPU_SCRATCH": str(scratch),
        "PACKC_GPU_PTXAS": str(unpack_ptxas(scratch / "ptxas") or ""),
        # Not on the path of every step: what is installed of peers changes what transformers does.
        "PACKC_GPU_PEERS": str(unpack_wheels(scratch / "peers") or ""),
        "PACKC_GPU_DRY": "1" if dry else "",
        "TRITON_CACHE_DIR": str(unpack_cache(scratch / "triton")),
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
    }


def lay_out_packc(folder: Path) -> None:
    """passes/ and ops/ where they are imported from. Of links, so that nobody sees an old copy; not the clone's own
    packc/passes and packc/ops, which need not have travelled."""
    package = folder / "packc"
    package.mkdir(parents=True)
    own = [file for file in (ROOT / "packc").iterdir() if file.name != "__pycache__" and not file.is_symlink()]
    for file in (*own, ROOT / "passes", ROOT / "ops"):
        (package / file.name).symlink_to(file)


def unpack_wheels(folder: Path) -> Path | None:
    wheels = sorted(TRAVEL.glob("*.whl"))
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    return folder if wheels else None


def unpack_ptxas(file: Path) -> Path | None:
    packed = TRAVEL / "ptxas.xz"
    if not packed.exists():
        return None
    file.write_bytes(lzma.decompress(packed.read_bytes()))
    file.chmod(0o755)
    return file


def unpack_cache(folder: Path) -> Path:
    """Triton's, with what was compiled elsewhere: it lists its files by their whole paths."""
    folder.mkdir()
    packed = TRAVEL / "triton.tar.xz"
    if packed.exists():
        with tarfile.open(packed) as archive:
            archive.extractall(folder, filter="data")
        move_cache(folder)
    return folder


def move_cache(folder: Path) -> None:
    """Makes Triton find a cache that has been moved to ``folder``."""
    for group in folder.glob("*/__grp__*"):
        paths = json.loads(group.read_text())["child_paths"]
        group.write_text(json.dumps({"child_paths": {name: str(group.with_name(name)) for name in paths}}))
