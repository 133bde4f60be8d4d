"""What runs here, and the card's two ceilings: bytes a copy moves and operations a product of matrices takes, a second.

Rates of these are what ``times.py`` divides by.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from telling import device, each, parser

CEILINGS = "ceilings.json"  # in the scratch folder


def main() -> None:
    args = parser(__doc__).parse_args()

    def facts_of(name: str) -> dict[str, Any]:
        return versions(args.dry) if name == "versions" else ceilings(args.dry)

    each(args, ["versions", "ceilings"], facts_of)


def versions(dry: bool) -> dict[str, Any]:
    import triton

    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    for module in ("transformers", "numpy", "einops"):
        try:
            facts[module] = __import__(module).__version__
        except ImportError as error:
            facts[module] = str(error)
    if dry:
        return facts | {"line": "a dry run: no figure means anything"}
    properties = torch.cuda.get_device_properties(0)
    facts |= {"card": properties.name, "processors": properties.multi_processor_count}
    facts["driver"] = _printed("nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader")
    facts["line"] = f"{facts['card']}, torch {facts['torch']}, triton {facts['triton']}, driver {facts['driver']}"
    return facts


def _printed(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)


def ceilings(dry: bool) -> dict[str, Any]:
    count, size = (2**20, 128) if dry else (2**30, 8192)
    source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=device(dry))
    target = torch.empty_like(source)
    bytes_per_second = 2 * count / seconds(lambda: target.copy_(source))
    x, y = (torch.randn(size, size, dtype=torch.bfloat16, device=device(dry)) for _ in range(2))
    flops = 2 * size**3 / seconds(lambda: x @ y)
    facts = {"bytes_per_second": bytes_per_second, "flops_per_second": flops}
    if scratch := os.environ.get("PACKC_GPU_SCRATCH"):
        (Path(scratch) / CEILINGS).write_text(json.dumps(facts))
    return facts | {"line": f"ceilings: {bytes_per_second / 1e12:.2f} TB/s, {flops / 1e12:.0f} TFLOP/s in bf16"}


def seconds(call: Any, rounds: int = 10) -> float:
    """The median of some calls, each from beginning to end on the device."""
    for _ in range(3):
        call()
    times = []
    for _ in range(rounds):
        if torch.cuda.is_available():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            before = time.perf_counter()
            call()
            times.append(time.perf_counter() - before)
    return sorted(times)[len(times) // 2]


if __name__ == "__main__":
    main()
