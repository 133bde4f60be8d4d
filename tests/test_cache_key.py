"""Graphs of one code that run differently are not taken for one another in torch's caches."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import RIGHT, RecordingBackend, batch_of, masks, tiny_mamba
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch.utils.checkpoint import checkpoint

import packc
from packc.cache_key import cache_key


class Block(torch.nn.Module):
    """One mixer whose output its backward needs: saved, or recomputed."""

    def __init__(self):
        super().__init__()
        self.taps = torch.nn.Parameter(torch.randn(4, 3))
        self.checkpointing = False

    def body(self, x):
        return packc.ops.causal_conv1d(x, self.taps).sin()

    def forward(self, x, mask):
        x = x * mask[..., None]
        return ((checkpoint(self.body, x, use_reentrant=False) if self.checkpointing else self.body(x)) * x).sum()


def convolutions_in_a_step(block):
    torch._dynamo.reset()
    fast = torch.compile(block, backend="packc", options={"packc.strict": True})
    mask = masks(RIGHT)
    x = torch.randn(*mask.shape, 4)
    fast(x, mask).backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fast(x, mask).backward()
    return sum(event.name == "packc_cpu::causal_conv1d" for event in profile.events())


def test_a_model_that_checkpoints_from_now_on_is_compiled_again_and_both_are_found_later():
    block = Block()
    with fresh_cache():
        assert convolutions_in_a_step(block) == 1
        block.checkpointing = True
        assert convolutions_in_a_step(block) == 2
        counters.clear()
        assert convolutions_in_a_step(block) == 2
        block.checkpointing = False
        assert convolutions_in_a_step(block) == 1
        assert counters["aot_autograd"]["autograd_cache_hit"] == 2


def in_a_process_of_its_own(cache: Path, *, checkpointing: bool) -> tuple[int, int]:
    """Convolutions in a step, and graphs found in the cache."""
    script = (
        "from test_cache_key import *; block = Block(); "
        f"block.checkpointing = {checkpointing}; print(convolutions_in_a_step(block), "
        "counters['aot_autograd']['autograd_cache_hit'])"
    )
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONPATH": str(Path(__file__).parent)}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    count, hits = map(int, result.stdout.split()[-2:])
    return count, hits


@pytest.mark.slow
def test_another_process_finds_the_graph_of_its_own_configuration(tmp_path):
    assert in_a_process_of_its_own(tmp_path, checkpointing=False) == (1, 0)
    assert in_a_process_of_its_own(tmp_path, checkpointing=True) == (2, 0)
    assert in_a_process_of_its_own(tmp_path, checkpointing=True) == (2, 1)


def key(model):
    torch._dynamo.reset()
    recorder = RecordingBackend(inner="eager")
    torch.compile(model, backend=recorder)(**batch_of(RIGHT))
    return cache_key(recorder.after[-1])


def test_the_key_is_equal_for_equal_graphs_and_follows_what_is_recomputed():
    model = tiny_mamba(layers=1)
    plain = key(model)
    assert plain == key(tiny_mamba(layers=1))
    model.gradient_checkpointing_enable()
    assert key(model) == key(model) != plain
