"""What runs padded in a graph with layouts: boundaries, and mixers of packc's own that no pack reaches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from packc.ops.mixer import MIXERS
from packc.passes.arguments import argument
from packc.passes.axes import covers_tokens
from packc.passes.graph import CU_SEQLENS, Graph
from packc.passes.module_names import module_path
from packc.passes.reasons import Boundary
from packc.passes.shifted import is_shift
from packc.passes.sources import argument_path, is_argument, is_parameter

_TOKENS = ("input_ids", "inputs_embeds")
_CACHES = {"cache", "past_key_values", "cache_params"}


def boundaries_of(graph: Graph) -> list[Boundary]:
    """Every op without a packed form that reads what the model computes of tokens, along them for all that is known.

    What prepares labels or counts a mask's tokens is none: it reads integers, or the mask alone.
    """
    found, computed, tokens, forms = [], set[fx.Node](), graph.tokens, graph.forms
    for node in graph.gm.graph.nodes:
        if node.op == "placeholder":
            layout = tokens.layout(node)
            features = layout is not None and len(layout) > 2 and node.meta["val"].is_floating_point()
            if features or is_parameter(node):
                computed.add(node)
            continue
        read = computed.intersection(node.all_input_nodes)
        if read and node.op == "call_function":
            computed.add(node)
        reading = tokens.readings.get(node)
        reason = reading.padded if reading is not None else tokens.refusals.get(node)
        if forms is not None and node not in forms.packed and node not in forms.padded:
            continue  # of a mask, say, that packed attention does not read
        if reason is not None and any(covers_tokens(tokens.layout(value)) for value in read):
            found.append(Boundary(f"{node.target}", module_path(node), reason))
    return found


def is_mixer(node: fx.Node, *, on_shards: bool = False) -> bool:
    """Whether a node is an op of packc's that looks along the sequence; ``on_shards``: or its form for a plan."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    namespace, name = node.target._schema.name.split("::")
    return namespace == "packc" and (name.removesuffix("_sharded") if on_shards else name) in MIXERS


def mixers_of(gm: fx.GraphModule) -> list[fx.Node]:
    """Those of a Dynamo graph, in checkpointed parts of it too."""
    return [node for node in _nodes(gm) if is_mixer(node)]


def _nodes(gm: fx.GraphModule) -> Iterator[fx.Node]:
    return (node for each in gm.modules() if isinstance(each, fx.GraphModule) for node in each.graph.nodes)


def told_of_documents(gm: fx.GraphModule) -> list[bool]:
    """Of each mixer in Dynamo's graph, on shards too, whether the model tells it where documents begin."""
    return [argument(node, "cu_seqlens") is not None for node in _nodes(gm) if is_mixer(node, on_shards=True)]


def has_rows(gm: fx.GraphModule) -> bool:
    """Whether an argument of a Dynamo graph may be rows of tokens."""
    values = [node.meta.get("example_value") for node in gm.graph.find_nodes(op="placeholder") if is_argument(node)]
    return any(isinstance(value, Tensor) and value.ndim > 1 for value in values)


def is_step(gm: fx.GraphModule) -> bool:
    """Whether a Dynamo graph is a model's on one token a row, as each step of a generation after the first is."""
    nodes = [node for node in gm.graph.find_nodes(op="placeholder") if is_argument(node)]
    tokens = [node.meta.get("example_value") for node in nodes if argument_path(node).split(".")[-1] in _TOKENS]
    return bool(tokens) and all(isinstance(each, Tensor) and each.ndim > 1 and each.shape[1] == 1 for each in tokens)


def goes_on_from_a_cache(gm: fx.GraphModule) -> bool:
    """Whether tensors of a cache are arguments of a Dynamo graph: a dynamic one has none before its first use."""
    nodes = [node for node in gm.graph.find_nodes(op="placeholder") if is_argument(node)]
    return any(not _CACHES.isdisjoint(argument_path(node).split(".")) for node in nodes)


def padded_mixers(graph: Graph, packed: set[fx.Node]) -> list[Boundary]:
    """The mixers that are not among the nodes computed packed, each with the reason."""
    elsewhere = f"works on values that never meet {argument_path(graph.mask)}: another sequence, or none"
    return [
        Boundary(f"{node.target}", module_path(node), graph.tokens.refusals.get(node, elsewhere))
        for node in graph.gm.graph.nodes
        if is_mixer(node) and node not in packed and not is_of_another_stream(node) and not is_shift(node)
    ]


def is_of_another_stream(node: fx.Node) -> bool:
    """Whether a mixer has been packed with its own sequence."""
    return any(each.op == "placeholder" and each.name.startswith(CU_SEQLENS) for each in node.all_input_nodes)
