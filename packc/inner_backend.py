"""What compiles a graph once packc is done with it: Inductor, or a backend that Dynamo knows by name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from packc import config
from packc.cache_key import cache_key, keyed_by
from packc.donated_buffers import keep_saved_tensors
from packc.kept_strides import keep_strides
from packc.private_torch import private_torch


def inner_backend(mode: str | None, options: dict[str, Any]) -> Callable[[fx.GraphModule, list[Any]], Any]:
    """``packc.config.inner`` with the mode and the options that are Inductor's.

    Raises:
        ValueError: the inner backend takes neither.
    """
    if config.inner == "inductor":
        with private_torch():
            from torch._inductor import list_mode_options

        patches = {**(list_mode_options(mode) if mode else {}), **options}
        return lambda gm, inputs: _inductor(gm, inputs, patches)
    if options or mode:
        raise ValueError(f"packc.inner={config.inner!r} takes neither a mode nor Inductor's options: {mode}, {options}")
    name = config.inner
    return lambda gm, inputs: _without_code_generation(gm, inputs, name)


def compiled_when_called(gm: fx.GraphModule, mode: str | None, options: dict[str, Any]) -> Callable[..., Any]:
    """A graph that few batches need: compiled with the first of them, for any sizes."""
    compiled: Callable[..., Any] = torch.compile(gm, backend=inner_backend(mode, options), dynamic=True)
    return compiled


def _inductor(gm: fx.GraphModule, inputs: list[Any], patches: dict[str, Any]) -> Any:
    with private_torch():
        from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    key = cache_key(gm)

    def compile_one(*args: Any, **kwargs: Any) -> Any:
        """Forward or backward, now or, with nothing of ours around it, when the first gradient is asked for."""
        keep_saved_tensors()
        keep_strides(args[0])
        with keyed_by(key), _hiding_communication(args[0]):
            return compile_fx_inner(*args, **kwargs)

    with keyed_by(key):
        return compile_fx(gm, inputs, inner_compile=compile_one, config_patches=patches)


def _hiding_communication(gm: fx.GraphModule) -> contextlib.AbstractContextManager[None]:
    """In a graph with collectives the last say on its order is packc's, unless the user has a pass of his own there."""
    with private_torch():
        from torch._inductor import config as inductor

    collectives = any(getattr(node.target, "namespace", "") == "_c10d_functional" for node in gm.graph.nodes)
    if not collectives or inductor.post_grad_custom_post_pass is not None:
        return contextlib.nullcontext()
    from packc.passes.overlap.inductor_pass import HideCommunication

    # Reordering for memory would undo it.
    return inductor.patch(post_grad_custom_post_pass=HideCommunication(), reorder_for_peak_memory=False)


def _without_code_generation(gm: fx.GraphModule, inputs: list[Any], name: str) -> Callable[..., Any]:
    with private_torch():
        from torch._dynamo import lookup_backend

    call = lookup_backend(name)(gm, inputs)
    keep_saved_tensors()
    return call
