"""Compiles every kernel that the steps launch, for sm_90 and without a GPU, into Triton's cache.

Run it with the Triton of the machine that the cache is for, and with its Python or ``--wheel``: both are part of the
keys. It says registers and spills of every kernel, and fails where one does not compile or spills in a configuration
that ships. With ``--travel`` it compiles into a folder of its own and lays that out with the peers and a newer ptxas:
see ``travel.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import child
import importable
import plan
import travel
from step import Facts

SHIPPED = "shipped"
LIMIT = 600.0  # seconds of one process


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--only", nargs="+", metavar="UNIT", help="such as 'ssd', of every way it is compiled")
    parser.add_argument("--check", action="store_true", help="compile nothing: say what the cache does not hold")
    parser.add_argument("--here", action="store_true", help="what ships alone, into this process's own cache")
    parser.add_argument("--travel", action="store_true", help="lay out what travels")
    parser.add_argument(
        "--wheel", type=Path, metavar="FILE", help="of the same Triton, for the Python of the machine the cache is for"
    )
    parser.add_argument("--unit", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.unit:
        return compile_unit(args.unit, args.check, args.wheel)
    if args.check or args.here:
        scratch = {"PACKC_GPU_SCRATCH": tempfile.gettempdir()}  # where no driver has made one
        return 0 if compile_all(args, scratch | os.environ | _binaries()) else 1
    with tempfile.TemporaryDirectory(prefix="packc-prebuild-") as scratch:
        environment = importable.environment(Path(scratch), dry=False) | _binaries()
        if args.travel:
            environment["PACKC_GPU_PTXAS"] = str(travel.fetch(Path(scratch) / "new-ptxas"))
        ok = compile_all(args, environment)
        if args.travel:  # what spills is slow, not wrong
            travel.lay_out_cache(Path(environment["TRITON_CACHE_DIR"]))
    return 0 if ok else 1


def _binaries() -> dict[str, str]:
    return {"TRITON_STORE_BINARY_ONLY": "1"}


def units(names: list[str] | None, everything: bool) -> list[tuple[str, str]]:
    """(way, unit): as it ships, and in each other way what is computed on matrix units, or what it is a choice of."""
    wanted = [name for name in (*plan.PRODUCTS, *plan.SCANS, "models", "pack") if not names or name in names]
    found = [(SHIPPED, name) for name in wanted]
    if everything:
        found += [(way, name) for way in plan.VARIANTS | plan.PROBES for name in wanted if name in plan.PRODUCTS]
        found += [(way, op) for way, (op, _) in plan.CHOICES.items() if op in wanted]
    return found


def compile_all(args: argparse.Namespace, environment: dict[str, str]) -> bool:
    began, lock = time.monotonic(), threading.Lock()
    results: dict[tuple[str, str], list[Facts]] = {}

    def run(unit: tuple[str, str]) -> bool:
        way, name = unit
        asked = (plan.VARIANTS | plan.PROBES | {name: asks for name, (_, asks) in plan.CHOICES.items()}).get(way, {})
        own = {key: text.format_map(environment) for key, text in asked.items()}
        if not all(own.values()):
            return True  # nothing to do it with
        kernels: list[Facts] = []
        other: list[str] = []
        command = [sys.executable, __file__, "--unit", name, *(["--check"] if args.check else [])]
        command += ["--wheel", str(args.wheel)] if args.wheel else []
        hear = _reader(kernels, other)
        ending = child.run(["nice", "-n", "5", *command], environment | own, LIMIT, LIMIT, hear, other.append)
        with lock:
            results[unit] = kernels
            return _told(way, name, kernels, ending, other)

    with ThreadPoolExecutor(args.jobs) as pool:
        ok = all(list(pool.map(run, units(args.only, everything=not (args.check or args.here)))))
    count = sum(map(len, results.values()))
    print(f"{count} kernels in {time.monotonic() - began:.0f} s", file=sys.stderr)
    return ok


def _reader(kernels: list[Facts], other: list[str]) -> Callable[[str], None]:
    def line(text: str) -> None:
        (kernels.append(json.loads(text)) if text.startswith('{"kernel"') else other.append(text))

    return line


def _told(way: str, name: str, kernels: list[Facts], ending: child.Ending, other: list[str]) -> bool:
    spilled = [facts for facts in kernels if facts["spilled"]]
    ok = ending.how == "done" and bool(kernels) and not (spilled and way == SHIPPED)
    why = "" if ending.how == "done" else f"{ending.how}: {' | '.join(other[-3:])}"
    facts = {
        "case": name if way == SHIPPED else f"{name}, {way}",
        "ok": ok,
        "why": why or (f"{len(spilled)} spill" if spilled else "" if kernels else "no kernel"),
        "kernels": len(kernels),
        "missed": sum(not facts["hit"] for facts in kernels),
        "most_registers": max((facts["registers"] for facts in kernels), default=0),
        "spilled": {f"{facts['kernel']}, {facts['warps']} warps": facts["spilled"] for facts in spilled},
        "seconds": round(ending.seconds, 1),
    }
    print(json.dumps(facts), flush=True)
    return ok


# ---- in a process of its own -----------------------------------------------------------------------------------------


def compile_unit(name: str, check: bool, wheel: Path | None) -> int:
    import launching
    import stand_in
    from cases import CASES
    from gpu_targets import spills_and_registers

    missed = launching.count_misses()
    known: set[str] = set()

    def heard(kernel: Any) -> None:
        if kernel is None:
            print(json.dumps({"kernel": "", "hit": False, "spilled": 0, "registers": 0}), flush=True)
        elif kernel.hash not in known:
            known.add(kernel.hash)
            spilled, registers = (0, 0) if check else spills_and_registers(kernel.asm["cubin"])
            facts = {"hit": not missed[kernel.src.name], "spilled": spilled, "registers": registers}
            facts |= {"warps": kernel.metadata.num_warps, "shared": kernel.metadata.shared}
            of = next(kind for kind in kernel.src.signature.values() if kind.startswith("*"))
            print(json.dumps({"kernel": f"{kernel.src.name} of {of[1:]}", **facts}), flush=True)
        missed.clear()

    launching.as_asked()
    stand_in.install(heard, Path(os.environ["PACKC_GPU_SCRATCH"]) / f"libcuda-{os.getpid()}", check, wheel)
    if name == "models":
        launch_models()
    if name == "pack":
        launch_pack()
    for case in CASES:
        if case.op == name:
            launch_case(case)
    return 0


def launch_case(case: Any) -> None:
    """Inputs of every length that a step gives it: what is a constant in a kernel may follow from it."""
    import cases
    import smoke
    import torch

    packed = case.form.startswith("packed")
    lengths = [cases.compared_lengths(case)]
    if case.dtype == "bf16":
        lengths += [cases.long_pack(cases.TOKENS)[0], smoke.LENGTHS] if packed else [[cases.TOKENS]]
    for each in lengths:
        cases.make(case, each, dry=False, on=torch.device("meta")).results()


def launch_pack() -> None:
    import smoke
    import torch

    x = torch.empty(4, 96, smoke.WIDTH, dtype=torch.bfloat16, device="meta", requires_grad=True)
    smoke.there_and_back(x, torch.empty(171, dtype=torch.int64, device="meta"))


def launch_models() -> None:
    """On CPU tensors, as batches have to be looked at. What kernels should compute is not, but for what are indices."""
    import models

    from packc.ops.pack import triton_op

    launch = triton_op.pack

    def pack(x: Any, index: Any) -> Any:
        launch(x, index)
        return x.flatten(0, 1)[index][None]

    triton_op.pack = pack
    for name in models.MODELS:
        for step in models.small_steps(name):
            step()


if __name__ == "__main__":
    sys.exit(main())
