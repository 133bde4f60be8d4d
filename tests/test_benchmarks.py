"""The benchmarks run as they stand, on sizes that take seconds; what they measure then means nothing."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(name, *arguments, **environment):
    ran = subprocess.run(
        [sys.executable, BENCHMARKS / name, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.slow
def test_ops_are_measured_into_a_table_and_a_plot(tmp_path):
    run("ops.py", "--device=cpu", "--tokens=256", "--channels=64", "--rounds=1", f"--output={tmp_path}")
    rows = list(csv.DictReader((tmp_path / "ops-cpu.csv").open()))
    mixers = {"gated_delta_rule", "linear_attention", "linear_scan", "ssd"}
    recurrences = mixers | {"selective_scan"}
    walks = {f"{recurrence}_states" for recurrence in recurrences}
    assert {row["op"] for row in rows} == {"causal_conv1d", "pack", "varlen_attention"} | recurrences | walks
    assert all(float(row["median_ms"]) > 0 for row in rows)
    assert (tmp_path / "ops-cpu.png").stat().st_size > 0


@pytest.mark.slow
def test_packmambas_protocol_gives_one_loss_three_ways(tmp_path):
    run(
        "packmamba.py",
        "--quick",
        "--device=cpu",
        "--documents=3",
        "--steps=1",
        f"--output={tmp_path}",
        PACKC_INNER="aot_eager",
    )
    losses = [float(row["loss"]) for row in csv.DictReader((tmp_path / "packmamba-cpu.csv").open())]
    assert losses == pytest.approx(losses[:1] * 3, rel=1e-5)


@pytest.mark.parametrize("part", ["simulate", pytest.param("bytes", marks=pytest.mark.slow)])
def test_sequence_parallelism_is_counted_and_simulated(part):
    assert {"simulate": "SIMULATED, not measured", "bytes": "on the wire"}[part] in run("sequence_parallel.py", part)


@pytest.mark.slow
def test_what_does_not_scale_is_listed_by_event():
    table = run("efficiency.py", "--rounds=1", "--rows=100")
    assert "efficiency" in table
    assert "aten::mm" in table


@pytest.mark.slow
def test_what_a_call_costs_is_told_by_shape_and_batch():
    table = run("overhead.py", "--inner=aot_eager", "--calls=2").splitlines()
    assert [line.split()[2] for line in table[2:]] == ["mask", "labels", "documents"] * 3


@pytest.mark.slow
def test_models_are_measured_a_line_each_and_not_twice(tmp_path):
    arguments = ("models.py", "--quick", "--stock=eager", f"--output={tmp_path}")
    run(*arguments, "llama", PACKC_INNER="aot_eager")
    assert "measured already" in run(*arguments, "llama")
    (line,) = map(json.loads, (tmp_path / "models.jsonl").open())
    assert line["family"] == "llama"
    assert line["loss, relative difference"] < 1e-5
    assert "llama" in (tmp_path / "models.md").read_text()
    assert (tmp_path / "models.png").stat().st_size > 0


@pytest.mark.slow
def test_steps_that_use_the_loss_alone_are_compared():
    table = run("logits.py", "--quick")
    assert "packc, logits at once" in table


@pytest.mark.slow
def test_prefill_is_measured_packed_and_unpacked():
    assert "llama" in run("prefill.py", "--quick", "llama", PACKC_INNER="aot_eager")


@pytest.mark.slow
def test_what_packing_costs_to_compile_is_told_by_layers(tmp_path):
    arguments = ("llama", "--layers", "1", "2", "--share-layers=0", f"--output={tmp_path / 'out.jsonl'}")
    told = run("compiling.py", *arguments, PACKC_INNER="aot_eager")
    assert "2 layers" in told
    (line,) = map(json.loads, (tmp_path / "out.jsonl").open())
    assert 0 < line["passes"]["1"]["nodes"] < line["passes"]["2"]["nodes"]
    assert line["memory"] < 1
