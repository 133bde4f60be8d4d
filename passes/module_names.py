"""The name of the module that made a node, as ``model.named_modules()`` has it: ``backbone.layers.0.mixer``.

Dynamo writes down how the compiled function reached the module instead: ``L['self'].backbone``,
``L['args'][0].backbone`` where a decorator wraps forward, ``L['model'].backbone`` where a function is compiled, and the
wrappers in between. Checked on torch 2.13.
"""

from __future__ import annotations

import re
from weakref import WeakKeyDictionary

from torch import fx

# ``L['args'][0]``: a local or global, then what holds the module without being one.
_ROOT = re.compile(r"[LG]\[['\"](?P<name>[^'\"]+)['\"]\](?P<rest>(\[[^\]]+\]|\.__closure__\[\d+\]\.cell_contents)*)\.?")
# How a model is reached that is the function's only one; says nothing of which model.
_NAMELESS = {"", "self", "fn", "args[0]"}
# Wrappers hold what they wrap under these names, which no model gives a child of its own.
_WRAPPED = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# These hold it as ``module``, which a model may have too.
_PARALLEL = {"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"}

_roots: WeakKeyDictionary[fx.Graph, dict[str, bool]] = WeakKeyDictionary()


def module_path(node: fx.Node) -> str:
    """``backbone.layers.0.mixer``: the innermost module whose forward made the node; empty for the model itself.

    Where a graph holds several models, the name under which the compiled function knows them stands in front.
    """
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    if node.graph not in _roots:
        _roots[node.graph] = _find_roots(node.graph)
    roots = _roots[node.graph]
    root, names = _split(stack)
    if roots.get(root) and names[:1] == ["module"]:
        names = names[1:]
    if len(roots) > 1 and root not in _NAMELESS:
        names = [root, *names]
    return ".".join(names)


def _find_roots(graph: fx.Graph) -> dict[str, bool]:
    """Each model of a graph -> whether all of it lies under ``module``, as in a wrapper that Dynamo saw through."""
    wrapped: dict[str, bool] = {}
    for node in graph.nodes:
        if stack := node.meta.get("nn_module_stack"):
            root, names = _split(stack)
            wrapped[root] = wrapped.get(root, True) and names[:1] == ["module"]
    return wrapped


def _split(stack: dict[str, tuple[str, object]]) -> tuple[str, list[str]]:
    """The model, as the compiled function reaches it, and the names below it."""
    entries = list(stack.values())
    parallel = {_parse(path) for path, kind in entries if getattr(kind, "__name__", str(kind)) in _PARALLEL}
    root, path = _parse(entries[-1][0])
    kept = [
        name
        for i, name in enumerate(path)
        if name not in _WRAPPED and not (name == "module" and (root, path[:i]) in parallel)
    ]
    return root, kept


def _parse(path: str) -> tuple[str, tuple[str, ...]]:
    found = _ROOT.match(path)
    root = ""
    if found is not None:
        held = found["rest"].replace(".__closure__", "").replace(".cell_contents", "").replace("'", "").replace('"', "")
        root, path = found["name"] + held, path[found.end() :]
    # ``._modules['backbone']`` and ``[0]`` are steps as well.
    steps = re.sub(r"\[['\"]?([^\]'\"]+)['\"]?\]", r".\1", path).split(".")
    return root, tuple(step for step in steps if step not in ("", "_modules"))
