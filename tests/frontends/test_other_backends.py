"""Importing packc changes nothing outside its own backend: not eager, not export, not another backend."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import batch, counts, tiny_model

import packc.frontends

packc.frontends.install()

SCRIPT = Path(__file__).parent / "tiny_models.py"


def in_a_fresh_process(order):
    done = subprocess.run([sys.executable, SCRIPT, order], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def stock():
    return in_a_fresh_process("stock")


@pytest.mark.parametrize("order", ["packc-first", pytest.param("model-first", marks=pytest.mark.slow)])
def test_whichever_is_imported_first_only_packc_sees_its_ops(order, stock):
    traced = in_a_fresh_process(order)
    for_packc = traced.pop("packc's backend")
    assert (for_packc["packc.causal_conv1d.default"], for_packc["packc.selective_scan.default"]) == (1, 1)
    for_stock = dict(stock)
    assert for_stock.pop("packc's backend") == for_stock["another backend"]
    assert traced == for_stock  # eager to the last bit


def packc_calls(recorder):
    return sum(count for graph in recorder.graphs for target, count in counts(graph).items() if "packc" in target)


@pytest.mark.parametrize("packc_first", [True, False])
def test_one_model_under_both_backends_keeps_two_graphs(packc_first, packc_backend, other_backend):
    model, inputs = tiny_model("mamba", layers=1, use_associative_scan=False), batch(4)
    backends = [packc_backend, other_backend] if packc_first else [other_backend, packc_backend]
    compiled = [torch.compile(model, backend=backend, fullgraph=True) for backend in backends]
    for _ in range(2):  # the second time round from the cache
        for call in compiled:
            call(**inputs)
    assert len(packc_backend.graphs) == len(other_backend.graphs) == 1
    assert packc_calls(packc_backend) == 2
    assert packc_calls(other_backend) == 0


def test_export_after_packc_compiled_the_model_has_the_original_functions(packc_backend):
    model, inputs = tiny_model("mamba", layers=1, use_associative_scan=False), batch(4)
    torch.compile(model, backend=packc_backend, fullgraph=True)(**inputs)
    exported = torch.export.export(model, (), inputs, strict=True)  # strict: by Dynamo
    assert not [target for target in counts(exported.graph) if "packc" in target]
