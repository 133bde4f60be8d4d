"""Several sequences in one graph, each with a mask: packed one after the other.

A graph in which one sequence is packed is a graph like any other. What is left of it in padded form, another sequence
among it, is found and packed by the same passes; of the first they see ops that have no rules.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from packc.fake_tensors import detect_fake_mode, enable_python_dispatcher
from packc.passes.graph import Graph
from packc.passes.unknown_sizes import unknown_size


def index_fakes(packed: Graph) -> tuple[Tensor, Tensor]:
    """Of what a packed graph takes beside its inputs: ``index`` (T,) and ``cu_seqlens`` (N + 1,). T and N are unknown
    and never guarded on; but where a row is one document, N is B."""
    mask, wanted = packed.mask.meta["val"], packed.requirements
    mode = detect_fake_mode([mask])  # a subclass, too, is made of fakes
    assert mode is not None
    shape_env = mode.shape_env
    if shape_env is None:
        shape_env = mode.shape_env = ShapeEnv()
    # From two on: at one token `contiguous` means something else, so the compiler would have to ask.
    tokens, offsets = (unknown_size(shape_env, 2) for _ in range(2))
    if wanted.one_document is not None and wanted.one_document_of_positions is not None:
        offsets = mask.shape[0] + 1
    with mode:
        index = torch.empty(tokens, dtype=torch.int64, device=mask.device)
        cu_seqlens = torch.empty(offsets, dtype=torch.int32, device=mask.device)
    return index, cu_seqlens


def with_inputs_of_its_own(packed: Graph) -> Graph:
    """A packed graph, as the passes want one: its inputs with the index among them, every node with its fake value."""
    inputs = [*packed.inputs, *index_fakes(packed)]
    mode = detect_fake_mode(inputs)
    # Some ops ask for sizes as numbers where it is off, and of tokens nobody knows any.
    with mode or contextlib.nullcontext(), torch.no_grad(), enable_python_dispatcher():
        _NotingValues(packed.gm).run(*inputs)
    return Graph(packed.gm, inputs, streams=packed.streams)


class _NotingValues(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op != "output":
            n.meta["val"] = value
        return value
