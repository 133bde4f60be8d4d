"""Builds and loads the C++ kernels of ``ops/csrc``, once per machine, with the compiler that Inductor uses as well.

Every ``csrc/NAME.cpp`` becomes a shared library of its own that registers its functions as ``torch.ops.packc_cpu.*``;
those that tell integers of a batch, and have nothing to differentiate, as ``torch.ops.packc_batch.*``. Schemas are
inferred from the functions. The first question, ``load("NAME")``, compiles all those that the cache lacks, in parallel,
and loads them. A kernel that does not build costs one warning, and its op runs the reference. The sources use the
dispatcher only, so neither ninja nor Python's headers are needed.

``PACKC_CACHE_DIR`` moves the cache (``~/.cache/packc``), ``CXX`` names another compiler. Nothing is loaded that another
user could have written. Whatever ends a build, nothing half-built is left under a library's name.
"""

import contextlib
import functools
import hashlib
import logging
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from filelock import FileLock

from packc.ops import cpu_autograd
from packc.ops.cache_folder import writable_by_others

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"

# The flags under which ATen's Vectorized<float> is eight or sixteen wide. Without the two macros it falls back to
# plain arrays; with -march=native a cache on a shared disk would hold instructions that another machine lacks.
_ISA_FLAGS = {
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mf16c"],
}


class BuildError(RuntimeError):
    """A kernel could not be compiled; the message is the compiler's."""


def load(name: str) -> bool:
    """Whether the functions of ``csrc/NAME.cpp`` are there to be called. Builds and loads them the first time."""
    return not _load_all()[name]


def failure(name: str) -> str:
    """Why ``csrc/NAME.cpp`` is not available; empty when it is."""
    return _load_all()[name]


@functools.cache
def _load_all() -> dict[str, str]:
    sources = sorted(SOURCES.glob("*.cpp"))
    with builders() as pool:
        built = list(pool.map(_build_or_explain, sources))
    failures = {source.stem: _load_or_explain(result) for source, result in zip(sources, built, strict=True)}
    cpu_autograd.refuse_derivatives()
    without: dict[str, list[str]] = {}
    for name, reason in failures.items():
        if reason:
            log.info("%s", reason)
            without.setdefault(reason.splitlines()[0], []).append(name)
    for reason, names in without.items():
        warnings.warn(
            f"packc: no C++ kernel for {', '.join(names)}, which run the slower reference: {reason} "
            "(TORCH_LOGS=packc shows the whole message)",
            stacklevel=2,
        )
    return failures


@contextlib.contextmanager
def builders() -> Iterator[ThreadPoolExecutor]:
    """Threads in which to :func:`build`. An interrupt ends the compilers, where it would wait for them."""
    pool = ThreadPoolExecutor(max_workers=os.cpu_count())
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for compiler in list(_compilers):
            _kill(compiler)
        raise
    finally:
        pool.shutdown()


def _build_or_explain(source: Path) -> Path | str:
    try:
        return build(source)
    except (BuildError, OSError) as error:
        return str(error)


def _load_or_explain(built: Path | str) -> str:
    if isinstance(built, str):
        return built
    try:
        torch.ops.load_library(built)
    except OSError as error:
        return str(error)
    return ""


def build(source: Path, cache: Path | None = None) -> Path:
    """The shared library of one source file: from the cache, or compiled into it.

    Raises:
        BuildError: there is no compiler, it failed, or another user may write to the cache.
        OSError: the cache cannot be written to.
    """
    compiler = find_compiler()
    command = [compiler, *_flags()]
    library = (cache or cache_dir()) / f"{source.stem}-{_key(source, command)}.so"
    if library.exists():
        return _trusted(library)
    log.info("compiling %s with %s (once; kept in %s)", source.name, compiler, library.parent)
    library.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    # One process compiles it, the others wait. Beside its place and moved there, so that nobody sees half a library.
    with FileLock(library.parent / f".{source.stem}.lock"):
        if library.exists():
            return _trusted(library)
        scratches = f".{source.stem}-building-"
        for abandoned in library.parent.glob(f"{scratches}*"):  # by a process that was killed
            shutil.rmtree(abandoned, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=library.parent, prefix=scratches) as scratch:
            fresh = Path(scratch) / library.name
            _compile([*command, str(source), "-o", str(fresh), *_libraries()])
            fresh.chmod(0o755)
            fresh.replace(library)
    return _trusted(library)


_compilers: set[subprocess.Popen[str]] = set()
"""That run now."""


def _compile(command: list[str]) -> None:
    with subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # a group of its own, with all that it starts
    ) as compiler:
        _compilers.add(compiler)
        try:
            _, errors = compiler.communicate()
        finally:
            _compilers.discard(compiler)
    if compiler.returncode != 0:
        first = next((line for line in errors.splitlines() if "error" in line.lower()), "it does not say why")
        raise BuildError(f"{command[0]} failed (exit status {compiler.returncode}): {first.strip()}\n{errors}")


def _kill(compiler: subprocess.Popen[str]) -> None:
    if not hasattr(os, "killpg"):
        compiler.kill()
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(compiler.pid, signal.SIGKILL)


def _trusted(library: Path) -> Path:
    path = writable_by_others(library)
    if path is not None:
        raise BuildError(
            f"other users may write to {path}, so nothing is loaded from there: let PACKC_CACHE_DIR name a folder that"
            " is yours alone, or take away their right"
        )
    return library


def find_compiler() -> str:
    """Inductor's own choice: ``$CXX``, else g++ (clang++ on macOS); the other one if that is missing."""
    usual = ["clang++", "g++"] if sys.platform == "darwin" else ["g++", "clang++"]
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else usual
    for candidate in candidates:
        if shutil.which(candidate):
            return candidate
    raise BuildError(f"no C++ compiler: looked for {' and '.join(candidates)}")


def cache_dir() -> Path:
    return Path(os.environ.get("PACKC_CACHE_DIR") or Path.home() / ".cache" / "packc")


def _flags() -> list[str]:
    from torch.utils.cpp_extension import include_paths  # here and not above, for it imports setuptools

    capability = torch.backends.cpu.get_cpu_capability()
    isa = capability if capability in _ISA_FLAGS else "DEFAULT"
    return [
        *("-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-fopenmp"),
        *("-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"),
        *_ISA_FLAGS.get(capability, []),
        *(f"-DCPU_CAPABILITY={isa}", f"-DCPU_CAPABILITY_{isa}"),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        # -isystem: torch's own headers shall not warn here.
        *(flag for path in include_paths() for flag in ("-isystem", path)),
    ]


def _libraries() -> list[str]:
    from torch.utils.cpp_extension import library_paths

    folders = library_paths()
    # The OpenMP runtime that torch itself has loaded: a second one would bring a second set of threads.
    bundled = [str(path) for folder in folders for path in sorted(Path(folder).glob("libgomp*.so*"))]
    return [*(f"-L{folder}" for folder in folders), "-ltorch_cpu", "-lc10", *bundled[:1]]


def _key(source: Path, command: list[str]) -> str:
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True, errors="replace").stdout
    digest = hashlib.sha256("\0".join([*command, version, torch.__version__, platform.machine()]).encode())
    for file in [source, *sorted(source.parent.glob("*.h"))]:
        digest.update(f"\0{file.name}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]
