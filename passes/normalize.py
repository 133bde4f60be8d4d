"""Dynamo graph -> pre-dispatch ATen graph: a few dozen functional ops instead of torch's whole Python surface.

Pre-dispatch keeps composite ops (``linear``, ``cross_entropy_loss``, ``matmul``) whole and comes before autograd and
autocast, so what the inner backend traces afterwards differentiates and casts exactly as the original graph would.
"""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import replace
from typing import Any

from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from packc.compilation import TracingContext, compilation_under_way
from packc.fake_tensors import FakeTensor, FakeTensorMode, detect_fake_mode
from packc.passes.checkpoints import InlineCheckpoints, tag_activation_checkpoint
from packc.passes.graph import Graph
from packc.passes.reasons import NotPackable
from packc.private_torch import private_torch

with private_torch():
    from torch._ops import HigherOrderOperator
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# What Inductor and AOTAutograd read from a graph that Dynamo made, besides its ``meta``.
# Private (torch/_functorch/_aot_autograd/frontend_utils.py).
_PLACEHOLDER_ATTRIBUTE = "_dynamo_source"
_MODULE_ATTRIBUTE = "_param_name_to_source"
# What Dynamo writes where such a derivative begins.
_DERIVATIVES = ("_grad_increment_nesting", "_jvp_increment_nesting", "_enter_dual_level")


def normalize(graph: Graph) -> Graph:
    """Retrace a graph on its inputs into one whose nodes are OpOverloads.

    Placeholders keep their order, names and metadata; every node's ``meta["val"]`` is its fake value, and
    ``nn_module_stack`` and ``stack_trace`` are those of the node it came from. Bodies of checkpoints are inlined and
    tagged for recomputation. The graph that came in is left as it was.

    Raises:
        NotPackable: the graph has another higher-order op, whose body would have to be rewritten too; or it has a
            derivative of ``torch.func``, where an error halfway would leave torch at work on it; or an input is of a
            subclass that wraps tensors, as quantised weights and DTensors are.
    """
    gm = graph.gm
    for node in gm.graph.nodes:
        if getattr(node.target, "__name__", None) in _DERIVATIVES:
            raise NotPackable(
                f"a derivative that torch takes inside the graph ({node.target.__name__}) is not followed"
            )
        if isinstance(node.target, HigherOrderOperator) and node.target is not tag_activation_checkpoint:
            raise NotPackable(f"{node.target}: the graph inside it is not packed")
        if node.op == "get_attr" and isinstance(getattr(gm, str(node.target), None), Tensor):
            raise NotPackable("tensors that are no inputs of the graph, as of an optimizer's step, are not followed")
    for node, value in zip(graph.placeholders, graph.inputs, strict=True):
        if node.users and is_traceable_wrapper_subclass(value):
            # Tracing would open it, and hold what is inside for constants.
            raise NotPackable(f"an input is a {type(value).__name__}, which wraps tensors: its ops are not followed")
    mode = detect_fake_mode(graph.inputs)
    with mode or contextlib.nullcontext(), fx.traceback.preserve_node_meta():
        normalized = make_fx(InlineCheckpoints(gm).run, pre_dispatch=True)(*graph.inputs)
    for old, new in zip(*(g.graph.find_nodes(op="placeholder") for g in (gm, normalized)), strict=True):
        new.meta = {**old.meta, **new.meta}
        new._rename(old.name)
        new.target = old.target
    carry_over_from_dynamo(gm, normalized)
    normalized.recompile()
    return replace(graph, gm=normalized)


def carry_over_from_dynamo(source: fx.GraphModule, target: fx.GraphModule) -> None:
    """Give ``target``, rewritten from ``source``, what Inductor and AOTAutograd expect of a graph from Dynamo.

    ``target`` has the placeholders of ``source`` first, in their order; any further ones are no argument of the user's.
    """
    target.meta.update(source.meta)
    if not hasattr(source, _MODULE_ATTRIBUTE):
        return
    setattr(target, _MODULE_ATTRIBUTE, getattr(source, _MODULE_ATTRIBUTE))
    placeholders = (g.graph.find_nodes(op="placeholder") for g in (source, target))
    for old, new in itertools.zip_longest(*placeholders):
        setattr(new, _PLACEHOLDER_ATTRIBUTE, getattr(old, _PLACEHOLDER_ATTRIBUTE, None))


def fakify(gm: fx.GraphModule, example_inputs: list[Any]) -> list[Any]:
    """The example inputs as fakes of the mode in which the inner backend will trace, with Dynamo's symbols.

    Dynamo hands over real tensors and remembers for each which of its sizes it made symbolic.
    """
    context = compilation_under_way()
    mode = (context.fake_mode if context is not None else None) or detect_fake_mode(example_inputs)
    if mode is None:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
    placeholders = gm.graph.find_nodes(op="placeholder")
    return [_fakify_one(mode, context, x, node) for x, node in zip(example_inputs, placeholders, strict=True)]


def _fakify_one(mode: FakeTensorMode, context: TracingContext | None, x: Any, node: fx.Node) -> Any:
    if not isinstance(x, Tensor):
        # A size that Dynamo made symbolic comes as a plain int; its placeholder knows the symbol.
        return node.meta.get("example_value", x)
    if isinstance(x, FakeTensor) and x.fake_mode is mode:
        return x
    with private_torch():
        symbolic = context.tensor_to_context.get(x) if context is not None else None
        source = symbolic.tensor_source if symbolic is not None else None
    if symbolic is None:
        return mode.from_tensor(x, static_shapes=mode.shape_env is None)
    return mode.from_tensor(x, symbolic_context=symbolic, source=source, trace=False)
