"""DistributedDataParallel: the graph is packed whole, and the packed graph is cut into DDP's buckets.

Under DDP, Dynamo's DDPOptimizer stands between Dynamo and the backend. It cuts the graph where DDP's buckets end, so
that gradients are reduced while the backward still runs, and has every piece compiled by itself. Of such pieces few
have the mask and none could be packed end to end. For packc's backend the order is the other way round: the optimizer
hands over the whole graph and cuts what packc made of it.

The only file that touches DDPOptimizer, which is private.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import functools
import importlib
import inspect
import logging
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import fx
from torch.nn.parallel import DistributedDataParallel

from packc.compilation import compilation_under_way
from packc.fake_tensors import detect_fake_mode
from packc.frontends.tracing_backend import is_packc_backend
from packc.import_hook import on_import
from packc.passes.normalize import carry_over_from_dynamo, fakify
from packc.passes.reasons import NotPackable
from packc.private_torch import private_torch

log = logging.getLogger(__name__)

aten = torch.ops.aten

Backend = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]

_MODULE = "torch._dynamo.backends.distributed"
_VALUE = "example_value"  # where Dynamo notes the fake value of a node

# The DDPOptimizer that handed over the graph which is being compiled.
_active: contextvars.ContextVar[Any] = contextvars.ContextVar("packc_ddp_optimizer", default=None)


@functools.cache
def install() -> None:
    """From now on DDPOptimizer hands packc's backend whole graphs. For other backends it does what it did.

    Dynamo imports its optimizer when it first meets DDP; nothing is imported for it before.
    """
    on_import({_MODULE: _hand_over_whole_graphs})


def _hand_over_whole_graphs(module: ModuleType) -> None:
    optimizer: Any = getattr(module, "DDPOptimizer", None)
    if _unknown(optimizer) is not None:
        return
    compile_pieces = optimizer.compile_fn

    @functools.wraps(compile_pieces)
    def compile_fn(self: Any, gm: fx.GraphModule, example_inputs: list[Any], **configs: Any) -> Any:
        # Of an optimizer that cuts for us the backend is the inner one.
        if not is_packc_backend(self.backend_compile_fn):
            return compile_pieces(self, gm, example_inputs, **configs)
        token = _active.set(self)
        try:
            return self.backend_compile_fn(gm, example_inputs, **configs)
        finally:
            _active.reset(token)

    optimizer.compile_fn = compile_fn


def _unknown(optimizer: Any) -> str | None:
    """Why this DDPOptimizer is not the one we know; None if it is."""
    version = torch.__version__
    try:
        constructor, compile_fn = (list(inspect.signature(f).parameters) for f in (optimizer, optimizer.compile_fn))
    except (AttributeError, TypeError) as error:
        return f"torch {version} has no DDPOptimizer that packc knows: {error!r}"
    if {"bucket_bytes_cap", "backend_compile_fn", "first_bucket_cap"} <= set(constructor) and compile_fn[:3] == [
        "self",
        "gm",
        "example_inputs",
    ]:
        return None
    return f"the DDPOptimizer of torch {version} has other parameters: {constructor}, {compile_fn}"


@functools.cache
def _moved() -> str | None:
    with private_torch():
        module = importlib.import_module(_MODULE)
    return _unknown(getattr(module, "DDPOptimizer", None))


def refuse_pieces() -> None:
    """A DDPOptimizer that we do not know cuts before we pack, and what a piece sets to zero the next one may read.

    Raises:
        NotPackable: the graph being compiled is such a piece; the first one is warned of.
    """
    if torch._dynamo.config.optimize_ddp not in (True, "ddp_optimizer"):
        return
    if not _is_in_forward() or (moved := _moved()) is None:
        return
    reason = f"{moved}; set torch._dynamo.config.optimize_ddp = False to pack under DistributedDataParallel"
    _warn_once(f"packc leaves a DistributedDataParallel model unpacked: {reason}")
    raise NotPackable(reason)


def _is_in_forward() -> bool:
    active = getattr(DistributedDataParallel, "_get_active_ddp_module", None)  # how Dynamo finds out
    return active is not None and active() is not None


def keeps_weights() -> bool:
    """Whether weights are there after the forward. FSDP and its like free them, and nothing on a weight says so."""
    return not (dist.is_available() and dist.is_initialized()) or _is_in_forward()


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(text, stacklevel=3)


def in_buckets(compile_inner: Backend) -> Backend:
    """``compile_inner``, piece by piece where DDP's buckets end if the graph being compiled came from DDPOptimizer.

    A graph that has no backward is left whole, and so is one that the optimizer fails to cut.
    """
    optimizer = _active.get()
    if optimizer is None or not torch.is_grad_enabled():
        return compile_inner

    with private_torch():
        from torch._dynamo.exc import RestartAnalysis  # here, as Dynamo is there when it compiles

    def compile_pieces(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        try:
            return _cut(optimizer, compile_inner, gm, inputs)
        except RestartAnalysis:
            raise  # no failure: Dynamo asked to trace the frame anew
        except Exception as error:
            log.info("a packed graph could not be cut", exc_info=True)
            reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        context = compilation_under_way()
        if context is not None:
            context.ddp_optimizer_ctx = None
            context.fakify_first_call = False
        # Whose fault it was shows here: an error of the inner backend's own comes again, and is nobody's fall-back.
        compiled = compile_inner(gm, inputs)
        warnings.warn(
            "a DistributedDataParallel graph is compiled in one piece, so its gradients are reduced after its backward "
            f"and not during it; cut where DDP's buckets end, a piece did not compile: {reason}",
            stacklevel=2,
        )
        return compiled

    return compile_pieces


def _cut(optimizer: Any, compile_inner: Backend, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    pieces = type(optimizer)(
        bucket_bytes_cap=optimizer.bucket_bytes_cap,
        backend_compile_fn=compile_inner,
        first_bucket_cap=optimizer.first_bucket_cap,
    )
    if all(_VALUE in node.meta for node in gm.graph.find_nodes(op="placeholder")):
        return pieces.compile_fn(gm, inputs)  # Dynamo's own graph, which could not be packed
    as_from_dynamo, fakes, sizes = _as_from_dynamo(gm, inputs)
    compiled = pieces.compile_fn(as_from_dynamo, fakes)
    return lambda *args: compiled(*args, *(args[position].shape[axis] for position, axis in sizes))


def _as_from_dynamo(gm: fx.GraphModule, inputs: list[Any]) -> tuple[fx.GraphModule, list[Any], list[tuple[int, int]]]:
    """A packed graph as it would be if Dynamo had written it, its inputs as fakes, and where its new inputs come from.

    By Dynamo's conventions a value crosses from piece to piece together with the symbols in its shape: every symbol is
    an input, the number of tokens too (size ``axis`` of input ``position``), and every node has its fake value.
    """
    result = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    placeholders = result.graph.find_nodes(op="placeholder")
    fakes = fakify(gm, inputs)
    sizes: list[tuple[int, int]] = []
    last = placeholders[-1]
    for position, (node, fake) in enumerate(zip(placeholders, fakes.copy(), strict=True)):
        if _VALUE in node.meta:
            continue
        node.meta[_VALUE] = fake
        for axis, size in enumerate(fake.shape):
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                with result.graph.inserting_after(last):
                    last = symbol = result.graph.placeholder(f"{node.name}_size_{axis}")
                symbol.meta[_VALUE] = size
                for user in [u for u in node.users if u.target is aten.sym_size.int and u.args == (node, axis)]:
                    user.replace_all_uses_with(symbol)
                    result.graph.erase_node(user)
                sizes.append((position, axis))
                fakes.append(size)
    carry_over_from_dynamo(gm, result)
    result.recompile()
    mode = detect_fake_mode(fakes)
    with mode or contextlib.nullcontext(), torch.no_grad():
        _NotingValues(result).run(*fakes)
    _write_numbers(result)
    return result, fakes, sizes


def _write_numbers(gm: fx.GraphModule) -> None:
    """A value that turned out to be one number is written where it is read: AOTAutograd takes none from a piece."""
    for node in gm.graph.nodes:
        number = _number(node.meta.get(_VALUE))
        if number is None or node.op == "output":
            continue
        replace = functools.partial(_replaced, node, number)
        for user in list(node.users):
            user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), replace)
        if node.op != "placeholder":
            gm.graph.erase_node(node)
    gm.recompile()


def _replaced(node: fx.Node, number: Any, each: fx.Node) -> Any:
    return number if each is node else each


def _number(value: Any) -> Any:
    if isinstance(value, (torch.SymInt, torch.SymFloat)) and value.node.expr.is_number:
        return int(value) if isinstance(value, torch.SymInt) else float(value)
    return value if isinstance(value, (int, float)) else None


class _NotingValues(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "call_function":
            n.meta[_VALUE] = value
        return value
