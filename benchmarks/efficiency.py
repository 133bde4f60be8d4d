"""What of a packed training step does not shrink with its tokens: ``python benchmarks/efficiency.py``.

The model of train.py on 8 rows padded to 320 tokens, 800 of 2560 positions real, and the same shape with nothing
padded. Both run in one compiled graph and one process, in turn. Efficiency is the step with nothing padded, times the
share of real tokens, over the padded step. A third batch has 16 tokens: nearly all of its step is what does not scale.
The table gives the milliseconds of each profiler event itself in the three steps, and, of the first two, what does not
scale: ``(a - share * b) / (1 - share)`` of an event that takes ``a`` padded and ``b`` full. It is profiled after the
timing, as the profiler slows small events down.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from statistics import median
from time import perf_counter

import torch
import train
from torch.profiler import ProfilerActivity, profile
from transformers import MambaConfig, MambaForCausalLM

import packc
from packc.demo.contender import ALLOCATOR

LENGTH = 320
LENGTHS = [320, 128, 96, 80, 64, 48, 40, 24]
FEW = [2] * 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25, help="steps of each batch")
    parser.add_argument("--rows", type=int, default=20, help="lines of the table")
    parser.add_argument("--dynamic", action="store_true", help="in the graph in which B and L are unknown")
    parser.add_argument("--default-allocator", action="store_true", help="malloc as it comes, not as train.py sets it")
    options = parser.parse_args()
    if not options.default_allocator and any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})

    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(**train.CONFIG))
    compiled = torch.compile(
        model, backend=packc.backend, options={"packc.strict": True}, dynamic=options.dynamic or None
    )
    padded, full, bare = batch(LENGTHS), batch([LENGTH] * len(LENGTHS)), batch(FEW)
    share = sum(LENGTHS) / (LENGTH * len(LENGTHS))

    def step(inputs: dict[str, torch.Tensor]) -> float:
        model.zero_grad()
        start = perf_counter()
        compiled(**inputs).loss.backward()
        return perf_counter() - start

    for inputs in (padded, full, bare) * 2:
        step(inputs)
    with torch._dynamo.config.patch(error_on_recompile=True):
        times = [(step(padded), step(full), step(bare)) for _ in range(options.rounds)]
        events = [_events(step, inputs) for inputs in (padded, full, bare)]
    few, many, least = (1e3 * median(each) for each in zip(*times, strict=True))
    ratio = median(share * b / a for a, b, _ in times)
    print(f"{torch.get_num_threads()} threads, {options.rounds} rounds")
    print(f"nothing padded {many:.1f} ms, {1 - share:.0%} padding {few:.1f} ms, efficiency {ratio:.3f}")
    print(f"does not scale: {(few - share * many) / (1 - share):.1f} ms; with {sum(FEW)} tokens {least:.1f} ms")
    fixed = {name: (events[0][name] - share * events[1][name]) / (1 - share) for name in events[0] | events[1]}
    print(f"{'ms fixed':>9} {'padded':>8} {'full':>8} {f'{sum(FEW)} tokens':>9}  event")
    for name in sorted(fixed, key=lambda name: -max(abs(fixed[name]), events[2][name]))[: options.rows]:
        print(f"{fixed[name]:9.2f} {events[0][name]:8.2f} {events[1][name]:8.2f} {events[2][name]:9.2f}  {name}")


def batch(lengths: list[int]) -> dict[str, torch.Tensor]:
    mask = (torch.arange(LENGTH) < torch.tensor(lengths)[:, None]).long()
    tokens = torch.randint(1, train.CONFIG["vocab_size"], mask.shape) * mask
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


def _events(step, inputs: dict[str, torch.Tensor], steps: int = 8) -> Counter[str]:
    """Milliseconds a step that each event takes itself."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(steps):
            step(inputs)
    return Counter({each.key: each.self_cpu_time_total / 1e3 / steps for each in profiled.key_averages()})


if __name__ == "__main__":
    main()
