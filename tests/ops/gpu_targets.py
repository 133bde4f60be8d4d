"""Compiles the Triton kernels that ops launch for GPUs that are not there: ``python gpu_targets.py <op> ... [--all]``.

A process of their own, since kernels defined under TRITON_INTERPRET=1 cannot be compiled together with the functions
they call. An op runs on meta tensors of a realistic size, its launches are recorded instead of made, and every kernel
is compiled for the types and specialisations its arguments would have: of an op's first call, which needs most, for the
chip that has least, and of some ops' last call for another; configurations take turns. ``--all``: all for all.
Prints one JSON object a kernel. Checked on triton 3.6 and 3.9.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from gpu_launches import CALLS
from launches import instead_of_launch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from packc.ops.tritonsrc import chips


class Chip(NamedTuple):
    target: GPUTarget
    shared_memory: int  # bytes that a block may have
    spills: int = 0  # bytes that a kernel may spill


CHIPS = {
    # Of three kernels ptxas keeps a value on the stack, for the sake of more warps: the scan in fp16 would lose a
    # quarter of those with more registers than the 128 it takes.
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 163 << 10, spills=8),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 227 << 10),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 227 << 10),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 64 << 10),
}
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int16: "i16",
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
    wide_loads: int | None  # of two registers or more a thread; not counted on AMD
    wgmma: bool


def recorded(run) -> list[Launch]:
    """The launches that ``run()`` would make."""
    launches: list[Launch] = []
    with instead_of_launch(lambda _, kernel, grid, **arguments: launches.append(Launch(kernel, arguments))):
        run()
    return launches


def configs(launch: Launch, chip: Chip) -> list[triton.Config]:
    offered = getattr(launch.kernel, "offered", None)
    return [triton.Config({}, num_warps=4)] if offered is None else offered(chip.target)


def compiled(launch: Launch, config: triton.Config, chip: Chip) -> Resources:
    function = launch.kernel if isinstance(launch.kernel, triton.JITFunction) else launch.kernel.fn
    options = {**config.all_kwargs(), **launch.arguments}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(function.params):
        value = options.pop(parameter.name)
        several = isinstance(value, tuple)
        places = {(index, n): x for n, x in enumerate(value)} if several else {(index,): value}
        kinds = tuple(_type(x, parameter) for x in places.values())
        signature[parameter.name] = kinds if several else kinds[0]
        for (place, x), kind in zip(places.items(), kinds, strict=True):
            if kind == "constexpr":
                constants[place] = x
            elif isinstance(x, torch.Tensor) or (type(x) is int and _aligned(x, parameter)):
                attributes[place] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constants, attributes)
    with chips.compiling(function, chip.target):
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
    loads = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\s", result.asm["ptx"])
    wide = sum(int(many or 1) * int(bits) >= 64 for many, bits in loads)
    wgmma = "wgmma.mma_async" in result.asm["ptx"]
    return Resources(*spills_and_registers(result.asm["cubin"]), result.metadata.shared, wide, wgmma)


def spills_and_registers(cubin: bytes) -> tuple[int, int]:
    # Without a driver Triton fills in neither registers nor spills, but the binary can be asked. What spills goes on
    # the stack, and nothing else of these kernels does.
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"\b{name}:(\d+)", told)[1]) for name in ("REG", "STACK", "LOCAL"))
    return stack + local, registers


def _amd(result: Any) -> Resources:
    text = result.asm["amdgcn"]
    # Scalar registers spill into lanes of vector registers, not into memory: they do not count.
    spilled, registers = (int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in ("vgpr_spill_count", "vgpr_count"))
    return Resources(spilled, registers, result.metadata.shared, None, False)


OTHERS = {"causal_conv1d": "gfx942", "linear_attention": "sm_90", "linear_scan": "sm_100"}


def few(op: str) -> list[tuple[str, str]]:
    """The first call for the chip that has least; of some ops, the last call for another."""
    calls, least = list(CALLS[op]), next(iter(CHIPS))
    return [(calls[0], least), *((calls[-1], chip) for name, chip in OTHERS.items() if name == op)]


def main(op: str, everything: bool) -> None:
    calls = CALLS[op]
    seen = set()
    pairs = [(call, chip) for call in calls for chip in CHIPS] if everything else few(op)
    for turn, call in enumerate(calls):
        chips = [chip for name, chip in pairs if name == call]
        for launch in recorded(calls[call]):
            for name in chips:
                chip, shipped = CHIPS[name], configs(launch, CHIPS[name])
                one = (turn + list(CHIPS).index(name)) % len(shipped)
                for config in shipped if everything else shipped[one : one + 1]:
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
                                "may_spill": chip.spills,
                                "registers": result.registers,
                                "shared_memory": result.shared_memory,
                                "limit": chip.shared_memory,
                                "wide_loads": result.wide_loads,
                                "wgmma": result.wgmma,
                            }
                        ),
                        flush=True,
                    )


if __name__ == "__main__":
    for op in sys.argv[1:]:
        if op != "--all":
            main(op, "--all" in sys.argv)
