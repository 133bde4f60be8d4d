"""What the call that Dynamo traces was given, the model's use of it aside.

Dynamo's graph has only inputs that the model reads, and a model that knows no positions does not read ``position_ids``,
by which a batch may say where documents begin. Traced for packc, such an input becomes one of the graph's.

The only file that looks into the frame that Dynamo traces.
"""

from __future__ import annotations

import weakref
from collections import UserDict
from collections.abc import Mapping
from typing import Any

import torch

from packc.private_torch import private_torch

# Traces that have been here, by identity: Dynamo's cannot be hashed.
_kept: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


BOUNDARIES = ("position_ids", "seq_idx", "cu_seqlens", "cu_seq_lens", "cu_seq_lens_q", "cu_seq_lens_k")
"""Arguments by which a caller says where documents begin."""


def is_called_with_boundaries() -> bool:
    """Whether the call being traced was given one that says nothing else: it is an input of the graph."""
    trace = _trace()
    if trace is None:
        return False
    with private_torch():
        frame = trace.root_tx.f_locals
    holders = (frame, *(value for value in frame.values() if isinstance(value, Mapping)))
    return any(isinstance(holder.get(name), torch.Tensor) for holder in holders for name in BOUNDARIES[1:])


def keep_boundaries() -> None:
    """Make them inputs of the graph being traced, though nothing in the model may read them."""
    output = _trace()
    if _kept.get(id(output)) is output:
        return
    _kept[id(output)] = output
    with private_torch():
        from torch._dynamo.source import AttrSource, DictGetItemSource, LocalSource
        from torch._dynamo.variables.base import VariableTracker
        from torch._dynamo.variables.builder import wrap_fx_proxy

        frame, code = output.root_tx.f_locals, output.root_tx.f_code

    def source_of(name: str) -> Any:
        free = name in code.co_freevars
        return LocalSource(name, is_input=not free, is_derefed_cell_contents=free or name in code.co_cellvars)

    given: list[tuple[Any, Any]] = [(source_of(name), frame.get(name)) for name in BOUNDARIES]
    for holder, value in frame.items():
        inside = source_of(holder)
        if isinstance(value, UserDict):  # a tokenizer's batch
            inside, value = AttrSource(inside, "data"), value.data
        if type(value) is dict:
            given.extend((DictGetItemSource(inside, name), value.get(name)) for name in BOUNDARIES)
    for source, value in given:
        if isinstance(value, torch.Tensor):
            tracked = VariableTracker.build(output.root_tx, value, source).realize()
            # An input without a reader would be dropped.
            reader = output.root_tracer.create_proxy(
                "call_function", torch.ops.aten.alias.default, (tracked.as_proxy(),), {}
            )
            wrap_fx_proxy(output.root_tx, reader)


def _trace() -> Any:
    """Dynamo's trace of this moment; None if there is none."""
    with private_torch():
        # Here and not above, for importing Dynamo takes as long as all of packc.
        from torch._dynamo.symbolic_convert import tls

    translator = getattr(tls, "current_tx", None)
    return None if translator is None else translator.output
