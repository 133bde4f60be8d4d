"""What packing costs to compile, and what it saves of memory: ``python benchmarks/compiling.py [family ...]``.

For each family of families.py, in one process:

- the passes' own CPU time and the nodes they begin with, at 4, 12, 24 and 48 layers: seconds should follow nodes;
- at ``--share-layers`` layers, their share of a first step's CPU time under Inductor;
- peak bytes of live tensors in a training step of 4 layers (hidden size 256, 8 rows of up to 128 tokens, half of them
  padding), as a share of the same step with nothing padded: tokens alone would make it 0.5;
- graphs compiled over batches of many shapes, where one for each axis that starts to vary is all there should be.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from families import FAMILIES, batch, build
from models import FILLED, LENGTH
from rich.console import Console
from rich.progress import track
from torch.profiler import profile

import packc
from packc import pipeline

RESULTS = Path(__file__).parent / "results" / "compiling.jsonl"
LAYERS = (4, 12, 24, 48)
SHAPES = [(4, 64), (4, 96), (6, 96), (3, 40), (8, 128), (2, 17)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "families", nargs="*", default=["mamba", "bamba", "llama"], choices=list(FAMILIES), metavar="family"
    )
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS, help="of which the passes are timed")
    parser.add_argument("--share-layers", type=int, default=24, help="0: do not compile under Inductor")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    console = Console()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("a") as out:
        for family in options.families:
            found: dict[str, Any] = {"family": family, "torch": torch.__version__}
            found["passes"] = {n: passes(family, n) for n in track(options.layers, f"{family}: passes")}
            if options.share_layers:
                found["share"] = {"layers": options.share_layers} | passes(family, options.share_layers, "inductor")
            found["memory"] = memory(family)
            found["graphs"] = graphs(family)
            out.write(json.dumps(found) + "\n")
            out.flush()
            console.print(told(found), markup=False)


def told(found: dict[str, Any]) -> str:
    lines = [found["family"]]
    for layers, each in found["passes"].items():
        lines.append(
            f"  {layers:2} layers: {each['nodes']:6} nodes, passes {each['seconds']:.2f} s, "
            f"{1e6 * each['seconds'] / each['nodes']:.0f} us a node"
        )
    if share := found.get("share"):
        part = share["seconds"] / share["step_seconds"]
        lines.append(
            f"  {share['layers']} layers under Inductor: {part:.1%} of {share['step_seconds']:.0f} s are the passes'"
        )
    lines.append(f"  peak of live tensors, half padded / full: {found['memory']:.2f}")
    lines.append(f"  graphs over {len(SHAPES)} shapes: {found['graphs']}")
    return "\n".join(lines)


def passes(family: str, layers: int, inner: str = "eager") -> dict[str, float]:
    """CPU seconds of the passes and of the whole first step, of a small model; nodes of Dynamo's graph."""
    torch._dynamo.reset()
    seconds, nodes, run = [0.0], [0], pipeline.packed_graph

    def timed(graph: Any, **options: Any) -> Any:
        nodes[0] += len(graph.gm.graph.nodes)
        began = time.process_time()
        try:
            return run(graph, **options)
        finally:
            seconds[0] += time.process_time() - began

    from packc import compiler

    compiler.packed_graph = timed
    try:
        model, inputs = build(family, 32, layers), batch([16, 5, 9], 16)
        compiled = torch.compile(model, backend="packc", options={"packc.inner": inner, "packc.strict": True})
        began = time.process_time()
        with torch._inductor.config.patch(force_disable_caches=True, compile_threads=1):
            compiled(**inputs).loss.backward()
        return {"seconds": seconds[0], "step_seconds": time.process_time() - began, "nodes": nodes[0]}
    finally:
        compiler.packed_graph = run


def memory(family: str) -> float:
    torch._dynamo.reset()
    model = build(family, 256, 4)
    compiled = torch.compile(model, backend="packc", options={"packc.strict": True})
    full, half = batch([LENGTH] * len(FILLED), LENGTH), batch([int(share * LENGTH) for share in FILLED], LENGTH)
    return peak(compiled, half) / peak(compiled, full)


def peak(compiled: Any, inputs: dict[str, Any]) -> int:
    """Bytes that a training step has at most, beyond what there was before it."""
    for _ in range(2):  # compiles
        compiled(**inputs).loss.backward()
    with profile(profile_memory=True) as profiler:
        compiled(**inputs).loss.backward()
    return max(_live(profiler))


def _live(profiler: Any) -> Iterator[int]:
    """Bytes after every allocation and release."""
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        yield total


def graphs(family: str) -> int:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(
        build(family, 32, 2), backend=packc.backend, options={"packc.inner": "aot_eager", "packc.strict": True}
    )
    for rows, length in SHAPES:
        compiled(**batch([length - n for n in range(rows)], length)).loss.backward()
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


if __name__ == "__main__":
    main()
