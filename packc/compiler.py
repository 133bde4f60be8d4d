"""The ``torch.compile`` backend: packs the graph, compiles it with an inner backend, packs each batch at run time."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._logging import trace_structured
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from packc import config
from packc.cache_key import cache_key, keyed_by
from packc.donated_buffers import keep_saved_tensors
from packc.options import split_options
from packc.packed_call import NotPacked, PackedCall
from packc.passes import (
    NoMask,
    NotPackable,
    Packed,
    WrongMask,
    check_mask,
    confirm_mask,
    fakify,
    find_mask,
    functional,
    layout,
    normalize,
    pack,
    widen_losses,
    zero_at_padding,
)
from packc.report import GraphReport

log = logging.getLogger(__name__)


def backend(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph on packed sequences: ``torch.compile(model, backend=packc.backend)``.

    Finds the padding mask among the graph's inputs, rewrites every op to work on real tokens only and hands the result
    to Inductor. Outputs keep size, dtype and strides; their padded positions are zero. What cannot be packed exactly
    runs as it was, with a log line that says why (``packc.config.strict`` raises instead).

    Args:
        gm: the graph that Dynamo captured.
        example_inputs: its inputs.
        mode: as for Inductor.
        options: ``"packc.<name>"`` sets :mod:`packc.config` for this model; other keys go to Inductor.

    Raises:
        ValueError: an unknown ``packc.`` option, or a ``packc.mask`` that names no ``(B, L)`` input.
        NotPacked: under ``strict``, the graph cannot be packed; when called, the batch cannot.
    """
    own, inner_options = split_options(options)
    with config.patch(own):
        call, _ = compile_graph(gm, example_inputs, mode=mode, options=inner_options, strict=own.get("strict"))
    return call


# Lets frontends tell packc's trace from another backend's; see packc.frontends.
backend.__packc_backend__ = True  # type: ignore[attr-defined]


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    strict: bool | None = None,
) -> tuple[Callable[..., Any], GraphReport]:
    """:func:`backend` under the current configuration, and a report of what it did."""
    compile_inner = _inner_backend(mode, options or {})
    try:
        packed, index = pack_graph(gm, example_inputs)
    except (NoMask, NotPackable) as reason:
        if config.strict:
            raise NotPacked(f"packc cannot pack this graph: {reason}") from None
        return _unpacked(gm, example_inputs, compile_inner, str(reason))
    except Exception as error:
        if config.strict or isinstance(error, WrongMask):
            raise
        # A mistake of ours must not stop anybody's training; it must not pass unseen either.
        log.exception("a pass failed")
        warnings.warn(f"packc failed on a graph and leaves it unpacked; please report this: {error!r}", stacklevel=2)
        return _unpacked(gm, example_inputs, compile_inner, f"a pass failed: {error!r}")
    requirements: Packed = packed.meta["packc"]
    call = PackedCall(compile_inner(packed, [*example_inputs, *index]), requirements, strict=strict)
    return call, GraphReport.packed(requirements, call)


def _unpacked(
    gm: fx.GraphModule, example_inputs: list[Any], compile_inner: Callable[..., Any], reason: str
) -> tuple[Callable[..., Any], GraphReport]:
    """The graph as it was; its mixers are packc's ops all the same."""
    log.info("not packed: %s", reason)
    return compile_inner(gm, example_inputs), GraphReport.unpacked(gm, reason)


def pack_graph(gm: fx.GraphModule, example_inputs: list[Any]) -> tuple[fx.GraphModule, tuple[Tensor, Tensor]]:
    """The packed form of a Dynamo graph, and fakes of its two further inputs, ``index`` and ``cu_seqlens``.

    Raises:
        NoMask, NotPackable: there is none; the message says why.
    """
    fakes = fakify(gm, example_inputs)
    _artifact("packc_before", gm)
    normalized = normalize(gm, fake_inputs=fakes)
    mask = find_mask(normalized, name=config.mask)
    check_mask(mask)
    labelled = layout(widen_losses(functional(normalized)), mask=mask)
    zero = zero_at_padding(labelled, mask)
    confirm_mask(labelled, mask, zero=zero, name=config.mask)
    packed = pack(labelled, mask=mask, zero=zero)
    _artifact("packc_after", packed)
    log.info("packed %d nodes into %d", len(gm.graph.nodes), len(packed.graph.nodes))
    return packed, _index_fakes(mask.meta["val"])


def _index_fakes(mask: Tensor) -> tuple[Tensor, Tensor]:
    """``index`` (T,) with T unknown and never guarded on, ``cu_seqlens`` (B + 1,)."""
    mode = mask.fake_mode  # type: ignore[attr-defined]
    shape_env = mode.shape_env
    if shape_env is None:
        shape_env = mode.shape_env = ShapeEnv()
    with shape_env.ignore_fresh_unbacked_symbols():
        tokens = shape_env.create_unbacked_symint()
    # From two on: at one token `contiguous` means something else, so the compiler would have to ask.
    torch._check(tokens >= 2)
    with mode:
        index = torch.empty(tokens, dtype=torch.int64, device=mask.device)
        cu_seqlens = torch.empty(mask.shape[0] + 1, dtype=torch.int32, device=mask.device)
    return index, cu_seqlens


def _inner_backend(mode: str | None, options: dict[str, Any]) -> Callable[..., Any]:
    if config.inner == "inductor":
        from torch._inductor import list_mode_options

        patches = {**(list_mode_options(mode) if mode else {}), **options}
        return lambda gm, inputs: _inductor(gm, inputs, patches)
    if options or mode:
        raise ValueError(f"packc.inner={config.inner!r} takes neither a mode nor Inductor's options: {mode}, {options}")
    return lambda gm, inputs: _without_code_generation(gm, inputs, config.inner)


def _inductor(gm: fx.GraphModule, inputs: list[Any], patches: dict[str, Any]) -> Any:
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    key = cache_key(gm)

    def compile_one(*args: Any, **kwargs: Any) -> Any:
        """Forward or backward, now or, with nothing of ours around it, when the first gradient is asked for."""
        keep_saved_tensors()
        with keyed_by(key):
            return compile_fx_inner(*args, **kwargs)

    with keyed_by(key):
        return compile_fx(gm, inputs, inner_compile=compile_one, config_patches=patches)


def _without_code_generation(gm: fx.GraphModule, inputs: list[Any], name: str) -> Callable[..., Any]:
    call = torch._dynamo.lookup_backend(name)(gm, inputs)
    keep_saved_tensors()
    return call


def _artifact(name: str, gm: fx.GraphModule) -> None:
    """The graph in the structured trace (tlparse), and in full under TORCH_LOGS="+packc"."""
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s\n%s", name, gm.print_readable(print_output=False))
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=lambda: gm.print_readable(print_output=False, include_stride=True, include_device=True),
    )
