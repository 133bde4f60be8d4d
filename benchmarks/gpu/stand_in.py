"""Compiles what packc launches without a GPU: the launch path as it is, with a stand-in for Triton's driver below.

Ops run on meta tensors, or on CPU tensors whose results nobody reads: each launch compiles its kernel in every
configuration that a tuner would try, into Triton's cache, and builds what will launch it. Checked on triton 3.6 and, of
which every kernel is launched by the same code, 3.9.
"""

from __future__ import annotations

import hashlib
import subprocess
import sysconfig
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import build, cache
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

TARGET = GPUTarget("cuda", 90, 32)
PROCESSORS = 132  # of an H100
# What Triton makes part of a launcher's key, on machines with and without the command ``file``.
PLATFORMS = ("x86_64,Linux,64bit,ELF", "x86_64,Linux,64bit,")

# Triton up to 3.6 compiles C for every signature.
LAUNCHERS_OF_SIGNATURES = hasattr(nvidia, "make_launcher")


class StandIn:
    """As much of a driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class NotCompiled(Exception):
    """Instead of a compilation, where kernels are only looked up."""


def install(compiled: Callable[[Any], None], libcuda: Path, look_up: bool = False, wheel: Path | None = None) -> None:
    """For the rest of the process. ``compiled`` hears of every kernel, as often as it is launched.

    Args:
        libcuda: a folder for a library of that name with nothing in it, to link against.
        look_up: compile nothing; ``compiled`` hears None for a kernel that Triton's cache does not hold.
        wheel: of the same Triton, for the Python of the machine that will launch. What it launches with wants that
            Python's headers, and is left to it.
    """
    triton.runtime.driver.set_active(StandIn())
    launchers = LAUNCHERS_OF_SIGNATURES and wheel is None
    if wheel is not None:
        key = key_under(wheel)
        cache.triton_key = lambda: key
    if launchers:
        triton.knobs.nvidia.libcuda_path = str(libcuda)
        nvidia.compile_module_from_src = find_launcher if look_up else build_launcher
        if not look_up:
            _make_empty_libcuda(libcuda)
            nvidia.CudaUtils()

    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        try:
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
            if launchers:
                nvidia.CudaLauncher(kernel.src, kernel.metadata)
        except NotCompiled:
            kernel = None
        compiled(kernel)

    def refuse(*_: Any) -> None:
        raise NotCompiled

    if look_up:  # the stages of a compilation are asked for when a kernel is not in the cache
        CUDABackend.add_stages = refuse

    def every_configuration(self: Any, *args: Any, **kwargs: Any) -> None:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        for config in self.prune_configs(kwargs):
            self.fn.run(*args, **kwargs, **config.all_kwargs())

    JITFunction.run = compile_only
    Autotuner.run = every_configuration
    _let_packc_choose_triton()


def _let_packc_choose_triton() -> None:
    from packc.ops import dispatch
    from packc.ops.tritonsrc import segments

    torch.cuda.get_device_capability = lambda *_: (9, 0)
    dispatch.choose = lambda op, x: "triton"
    segments._processors = lambda device: PROCESSORS
    library = torch.library.Library("packc", "IMPL")
    for name in dir(torch.ops.packc):
        op = getattr(getattr(torch.ops.packc, name), "default", None)
        if isinstance(op, torch._ops.OpOverload) and op.has_kernel_for_dispatch_key(torch.DispatchKey.CPU):
            library.impl(name, _as_on_a_device(op), "Meta", allow_override=True)
    _kept.append(library)


_kept: list[Any] = []  # a library that is collected takes its kernels along


def _as_on_a_device(op: Any) -> Callable[..., Any]:
    keys = torch._C.DispatchKeySet(torch.DispatchKey.CPU)
    return lambda *args: op.redispatch(keys, *args)


def key_under(wheel: Path) -> str:
    """What a wheel of this Triton for another Python makes part of every kernel's key: the same, but for its library.

    Raises:
        ValueError: the wheel is of another release.
    """
    if wheel.name.split("-")[:2] != ["triton", triton.__version__]:
        raise ValueError(f"{wheel.name} is not of triton {triton.__version__}, which compiles here")
    with zipfile.ZipFile(wheel) as archive:
        other = hashlib.sha256(archive.read("triton/_C/libtriton.so")).hexdigest()
    own = hashlib.sha256((Path(triton.__file__).parent / "_C" / "libtriton.so").read_bytes()).hexdigest()
    key = cache.triton_key()
    if own not in key:
        raise ValueError(f"the key of triton {triton.__version__} does not hold its library")
    return key.replace(own, other)


def build_launcher(src: str, name: str, **places: Any) -> Any:
    """In place of Triton's own: never loads what it builds, which wants a driver, and builds it for all platforms."""
    file = _launcher_file(name)
    managers = _launcher_folders(src)
    if not managers[-1].has_file(file):
        kept: list[str] = []
        load, build._load_module_from_path = build._load_module_from_path, lambda name, path: kept.append(path)
        try:
            build.compile_module_from_src(src=src, name=name, **places)
        finally:
            build._load_module_from_path = load
        binary = Path(kept[0]).read_bytes()
        for manager in managers:
            manager.put(binary, file, binary=True)
    return _nothing_loaded()


def find_launcher(src: str, name: str, **_: Any) -> Any:
    """In place of Triton's own, where launchers are looked up."""
    if not any(manager.has_file(_launcher_file(name)) for manager in _launcher_folders(src)):
        raise NotCompiled
    return _nothing_loaded()


def _launcher_file(name: str) -> str:
    return name + sysconfig.get_config_var("EXT_SUFFIX")


def _launcher_folders(src: str) -> list[Any]:
    return [cache.get_cache_manager(hashlib.sha256((src + key).encode()).hexdigest()) for key in PLATFORMS]


def _nothing_loaded() -> Any:
    names = ("launch", "PyCUtensorMap", "load_binary", "get_device_properties", "cuOccupancyMaxActiveClusters")
    return types.SimpleNamespace(**dict.fromkeys((*names, "set_printf_fifo_size", "fill_tma_descriptor")))


def _make_empty_libcuda(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    command = ["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-o", str(folder / "libcuda.so.1"), "-x", "c", "/dev/null"]
    subprocess.run(command, check=True)
