"""Versions, the compiler, the cache of built kernels."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import as_completed
from pathlib import Path

import torch

import packc
from packc.doctor.finding import Finding
from packc.ops import cpu_library, triton_presence

# Not what packc needs, but what its users bring.
_OTHERS = ("transformers", "accelerate", "mamba_ssm", "causal_conv1d", "flash-linear-attention", "mambapy")


def versions() -> Iterator[Finding]:
    yield Finding("ok", f"packc {packc.__version__}", f"Python {platform.python_version()}, {platform.platform()}")
    yield Finding("ok", f"torch {torch.__version__}", _devices())
    if reason := triton_presence.missing():
        yield Finding("fail" if torch.cuda.is_available() else "note", "triton", f"{reason}; GPUs run the reference")
    else:
        yield Finding("ok", f"triton {_version('triton')}")
    found = [f"{name} {version}" for name in _OTHERS if (version := _version(name))]
    yield Finding("ok", "libraries", ", ".join(found) or "none that packc knows")


def _devices() -> str:
    if not torch.cuda.is_available():
        return f"no GPU, {torch.get_num_threads()} threads"
    return ", ".join(torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count()))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def compiler() -> Iterator[Finding]:
    """The one that builds the kernels, where they are kept, and each kernel as it is there."""
    try:
        command = cpu_library.find_compiler()
    except cpu_library.BuildError as error:
        yield Finding("note", "C++ compiler", f"{error}; CPUs run the slower reference. CXX names one")
        return
    shown = subprocess.run([command, "--version"], capture_output=True, text=True, errors="replace").stdout
    capability = torch.backends.cpu.get_cpu_capability()
    yield Finding("ok", f"{command} for {capability}", f"{shutil.which(command)}: {(shown.splitlines() or ['?'])[0]}")
    cache = cpu_library.cache_dir()
    yield _writable(cache)
    yield from _kernels(cache)


def _writable(cache: Path) -> Finding:
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return Finding("fail", "cache", f"{error}; PACKC_CACHE_DIR moves it")
    free = shutil.disk_usage(cache).free
    if not os.access(cache, os.W_OK):
        return Finding("note", "cache", f"{cache} cannot be written to: what is not built yet cannot be kept")
    return Finding("ok" if free > 1 << 28 else "note", "cache", f"{cache}, {free / 2**30:.1f} GiB free")


def _kernels(cache: Path) -> Iterator[Finding]:
    sources = sorted(cpu_library.SOURCES.glob("*.cpp"))
    before = set(cache.glob("*.so"))
    with cpu_library.builders() as pool:
        building = {pool.submit(cpu_library.build, source): source for source in sources}
        for future in as_completed(building):
            name = building[future].stem
            try:
                library = future.result()
            except (cpu_library.BuildError, OSError) as error:
                yield Finding("fail", f"kernel {name}", str(error))
            else:
                yield Finding("ok", f"kernel {name}", "was built" if library in before else "built now")
