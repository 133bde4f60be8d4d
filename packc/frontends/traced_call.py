"""What the call that Dynamo traces was given, the model's use of it aside.

Dynamo's graph has only inputs that the model reads, and a model that knows no positions does not read ``position_ids``,
which a later batch may use to say where documents begin. Traced for packc, such an input becomes one of the graph's.

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


def arguments_of_traced_call(*names: str) -> dict[str, Any]:
    """The values of those arguments, by position or keyword, that the call being traced was given; {} if none is."""
    trace = _trace()
    if trace is None:
        return {}
    with private_torch():
        frame = trace.root_tx.f_locals
    found: dict[str, Any] = {}
    for holder in (frame, *(value for value in frame.values() if isinstance(value, Mapping))):
        found.update({name: holder[name] for name in names if name in holder})
    return found


def keep_as_input(name: str) -> None:
    """Make an argument an input of the graph being traced, though nothing in the model may read it."""
    output = _trace()
    if _kept.get(id(output)) is output:
        return
    _kept[id(output)] = output
    with private_torch():
        from torch._dynamo.source import AttrSource, DictGetItemSource, LocalSource
        from torch._dynamo.variables.base import VariableTracker
        from torch._dynamo.variables.builder import wrap_fx_proxy

        frame = output.root_tx.f_locals
    given: list[tuple[Any, Any]] = [(LocalSource(name, is_input=True), frame.get(name))]
    for holder, value in frame.items():
        inside: Any = LocalSource(holder, is_input=True)
        if isinstance(value, UserDict):  # a tokenizer's batch
            inside, value = AttrSource(inside, "data"), value.data
        if type(value) is dict:
            given.append((DictGetItemSource(inside, name), value.get(name)))
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
