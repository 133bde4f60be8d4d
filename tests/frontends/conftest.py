import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager, eager

import packc

sys.path.insert(0, str(Path(__file__).parent))  # for tiny_models, which subprocesses run as a script


class Recorder:
    """A backend that keeps the graphs it is given and has ``compiler`` run them."""

    def __init__(self, compiler, packc: bool) -> None:
        self.compiler = compiler
        self.__packc_backend__ = packc
        self.graphs: list[torch.fx.Graph] = []

    def __call__(self, gm, example_inputs, **options):
        self.graphs.append(gm.graph)
        return self.compiler(gm, example_inputs)

    def calls(self, op) -> int:
        return sum(node.target is op for graph in self.graphs for node in graph.nodes)


@pytest.fixture
def packc_backend():
    """A recorder that counts as packc's backend."""
    return Recorder(aot_eager, packc=True)


@pytest.fixture
def other_backend():
    return Recorder(eager, packc=False)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _no_kernels(monkeypatch):
    """What a graph holds does not depend on the kernels; building them takes a minute."""
    monkeypatch.setenv("PACKC_KERNELS", "reference")  # for subprocesses
    with packc.config.patch(kernels="reference"):
        yield
