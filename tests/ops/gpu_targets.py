"""Compiles the Triton kernels that an op launches for GPUs that are not there: ``python gpu_targets.py <op>``.

A process of its own, since kernels defined under TRITON_INTERPRET=1 cannot be compiled together with the functions they
call. The op runs on meta tensors of a realistic size, its launches are recorded instead of made, and every kernel is
compiled for every chip, with every shipped configuration, for the types and specialisations its arguments would have.
Prints one JSON object a kernel. Checked on triton 3.6 and 3.9.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource


class Chip(NamedTuple):
    target: GPUTarget
    shared_memory: int  # bytes that a block may have


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 227 << 10),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 227 << 10),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 64 << 10),
}
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.bool: "i1",
}


class Launch(NamedTuple):
    kernel: Any
    arguments: dict[str, Any]


class Resources(NamedTuple):
    spilled: int  # bytes on NVIDIA, registers on AMD
    registers: int
    shared_memory: int  # bytes
    assembly: str


def recorded(run) -> list[Launch]:
    """The launches that ``run()`` would make."""
    from packc.ops.tritonsrc import launch as module

    launches: list[Launch] = []
    real = module.launch
    users = [m for m in sys.modules.values() if getattr(m, "launch", None) is real]
    for user in users:
        user.launch = lambda kernel, grid, **arguments: launches.append(Launch(kernel, arguments))
    try:
        run()
    finally:
        for user in users:
            user.launch = real
    return launches


def configs(launch: Launch) -> list[triton.Config]:
    return getattr(launch.kernel, "configs", [triton.Config({}, num_warps=4)])


def compiled(launch: Launch, config: triton.Config, chip: Chip) -> Resources:
    function = launch.kernel if isinstance(launch.kernel, triton.JITFunction) else launch.kernel.fn
    options = {**config.all_kwargs(), **launch.arguments}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(function.params):
        value = options.pop(parameter.name)
        kind = signature[parameter.name] = _type(value, parameter)
        if kind == "constexpr":
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor) or (type(value) is int and _aligned(value, parameter)):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constants, attributes)
    result = triton.compile(source, target=chip.target, options={"enable_fp_fusion": True, **options})
    return (_amd if chip.target.backend == "hip" else _nvidia)(result)


def _aligned(value: int, parameter: Any) -> bool:
    return not parameter.do_not_specialize and not parameter.do_not_specialize_on_alignment and value % 16 == 0


def _type(value: Any, parameter: Any) -> str:
    if (
        parameter.is_constexpr
        or value is None
        or (type(value) is int and value == 1 and not parameter.do_not_specialize)
    ):
        return "constexpr"
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _nvidia(result: Any) -> Resources:
    # Without a driver Triton fills in neither registers nor spills; the assembler it uses tells them of the same PTX.
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(result.asm["ptx"])
        chip = re.search(r"\.target (sm_\w+)", result.asm["ptx"])[1]
        command = [get_ptxas(result.metadata.target.arch).path, "-v", f"--gpu-name={chip}", source]
        done = subprocess.run(
            [*command, "-o", Path(folder, "kernel.cubin")], capture_output=True, text=True, check=True
        )
    told = done.stderr + done.stdout
    stores, loads = (int(re.search(rf"(\d+) bytes spill {kind}", told)[1]) for kind in ("stores", "loads"))
    registers = int(re.search(r"Used (\d+) registers", told)[1])
    return Resources(stores + loads, registers, result.metadata.shared, result.asm["ptx"])


def _amd(result: Any) -> Resources:
    text = result.asm["amdgcn"]
    names = ("vgpr_spill_count", "sgpr_spill_count", "vgpr_count")
    vector, scalar, registers = (int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in names)
    return Resources(vector + scalar, registers, result.metadata.shared, text)


def main(op: str) -> None:
    """``gpu_launches.<op>`` is a dict of named calls of the op on meta tensors."""
    calls = importlib.import_module("gpu_launches").CALLS[op]
    seen = set()
    for call, run in calls.items():
        for launch in recorded(run):
            for config in configs(launch):
                for name, chip in CHIPS.items():
                    types = {key: getattr(value, "dtype", value) for key, value in launch.arguments.items()}
                    fingerprint = (launch.kernel, str(types), str(config), name)
                    if fingerprint in seen:
                        continue
                    seen.add(fingerprint)
                    result = compiled(launch, config, chip)
                    function = getattr(launch.kernel, "fn", launch.kernel)
                    print(
                        json.dumps(
                            {
                                "kernel": getattr(function, "__name__", str(function)),
                                "call": call,
                                "config": str(config),
                                "chip": name,
                                "spilled": result.spilled,
                                "registers": result.registers,
                                "shared_memory": result.shared_memory,
                                "limit": chip.shared_memory,
                            }
                        ),
                        flush=True,
                    )


if __name__ == "__main__":
    main(sys.argv[1])
