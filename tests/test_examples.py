"""The examples run as they stand, on sizes that take seconds and without code generation, which would take a minute."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SIZES = ["--batch-size=3", "--max-length=48", "--hidden-size=16", "--layers=1"]
SMALL = ["--steps=10", *SIZES]


@pytest.mark.parametrize(
    ("name", "says"),
    [pytest.param("train_loop.py", "step  10", marks=pytest.mark.slow), ("hf_trainer.py", "train_loss")],
)
def test_example(name, says):
    environment = {**os.environ, "PACKC_INNER": "aot_eager"}
    ran = subprocess.run([sys.executable, EXAMPLES / name, *SMALL], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert says in ran.stdout
    assert "packc left" not in ran.stderr  # nothing fell back


TRAINERS = {  # what each prints at its end; PACKC_STRICT sees to it that it was packed
    "accelerate_loop.py": "step  10",
    "lightning_module.py": "val_loss",
    "trl_trainers.py sft": "eval_loss",
    "trl_trainers.py padding-free": "eval_loss",
    "trl_trainers.py dpo": "eval_rewards/margins",
    "trl_trainers.py reward": "eval_margin",
}


@pytest.mark.slow
@pytest.mark.parametrize("command", TRAINERS)
def test_trainers_of_other_libraries(command):
    library = command.split("_")[0]
    pytest.importorskip(library)
    name, *kind = command.split()
    environment = {**os.environ, "PACKC_INNER": "aot_eager", "PACKC_STRICT": "1"}
    steps = "--steps=10" if library == "accelerate" else "--steps=4"
    ran = subprocess.run(
        [sys.executable, EXAMPLES / name, *kind, steps, *SIZES], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert TRAINERS[command] in ran.stdout
    assert "packc left" not in ran.stderr


def test_one_stream_on_two_processes_has_the_losses_of_one():
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    small = ["--tokens=96", "--steps=3", "--hidden-size=16"]
    ran = subprocess.run([*launch, EXAMPLES / "lasp_torchrun.py", *small], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    lines = [line.split() for line in ran.stdout.splitlines()]
    assert len(lines) == 6
    for *_, on_ranks, _, _, on_one in lines:
        assert float(on_ranks) == pytest.approx(float(on_one), rel=1e-4)


@pytest.mark.slow
def test_a_hybrid_cut_over_two_processes_has_the_losses_of_one():
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    small = ["--length=64", "--steps=3", "--hidden-size=32", "--layers=2"]
    environment = {**os.environ, "PACKC_INNER": "aot_eager"}
    ran = subprocess.run(
        [*launch, EXAMPLES / "sequence_parallel.py", *small], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    *steps, peaks = [line.split() for line in ran.stdout.splitlines()]
    for *_, on_ranks, _, _, on_one in steps:
        assert float(on_ranks) == pytest.approx(float(on_one), rel=1e-4)
    assert len(steps) == 3
    assert peaks[0] == "MiB"


@pytest.mark.slow
def test_a_long_stream_in_chunks_has_one_loss_and_needs_less_memory():
    small = ["--tokens=4096", "--most=8", "--hidden-size=32", "--layers=1"]
    ran = subprocess.run([sys.executable, EXAMPLES / "long_stream.py", *small], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    memory = [float(line.split()[-2]) for line in ran.stdout.splitlines()]
    assert len(memory) == 4
    assert memory[-1] < memory[0]


@pytest.mark.slow
def test_generation_packs_its_prompts():
    small = ["--steps=1", "--batch-size=3", "--max-length=24", "--hidden-size=16", "--new-tokens=3"]
    environment = {**os.environ, "PACKC_INNER": "aot_eager", "PACKC_STRICT": "1"}
    ran = subprocess.run(
        [sys.executable, EXAMPLES / "generate.py", *small], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert "tokens as stock's: True" in ran.stdout
    assert "in 1 packed calls" in ran.stdout


def test_every_example_is_tested():
    tested = re.findall(r'"(\w+\.py)\b', Path(__file__).read_text())
    assert {file.name for file in EXAMPLES.glob("*.py")} == set(tested)


@pytest.mark.slow
def test_trainer_on_two_processes_has_the_losses_of_one():
    environment = {**os.environ, "PACKC_INNER": "aot_eager", "PACKC_STRICT": "1"}
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    losses = []
    for launch in ([sys.executable], two):
        command = [*launch, EXAMPLES / "sequence_trainer.py", "--steps=3", *SIZES]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        losses.append(re.findall(r"'(?:loss|grad_norm)': '([^']+)'", ran.stdout))
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6
