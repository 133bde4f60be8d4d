"""The ``torch.compile`` backend: packs the graph, compiles it with an inner backend, packs each batch at run time."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from packc import config
from packc.boundaries import ignored_boundaries, positions_inputs
from packc.compilation import ends_in_a_graph_break
from packc.ddp import in_buckets, refuse_pieces
from packc.inner_backend import compiled_when_called, inner_backend
from packc.options import split_options
from packc.packed_call import NotPacked, PackedCall, UnpackedCall, say_once
from packc.passes import (
    Boundary,
    Graph,
    NoMask,
    NotPackable,
    WrongMask,
    fakify,
    is_mixer,
    without_marks,
)
from packc.pipeline import UnknownPass, packed_graph
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
    to Inductor. Outputs keep size, dtype and strides (of a part of something larger, the order of axes); their padded
    positions are zero. What cannot be packed exactly runs as it was, with a log line that says why
    (``packc.config.strict`` raises instead).

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
    compile_inner = in_buckets(inner_backend(mode, options or {}))
    ignored = ignored_boundaries(gm)
    if ignored is not None:
        say_once(ignored, set())
    try:
        refuse_pieces()
        packed, index = pack_graph(gm, example_inputs)
    except (NoMask, NotPackable) as reason:
        if config.strict:
            raise NotPacked(f"packc cannot pack this graph: {reason}") from None
        boundaries = reason.boundaries if isinstance(reason, NotPackable) else []
        return _unpacked(gm, example_inputs, compile_inner, str(reason), boundaries)
    except Exception as error:
        if config.strict or isinstance(error, (WrongMask, UnknownPass)):
            raise
        # A mistake of ours must not stop anybody's training; it must not pass unseen either.
        log.exception("a pass failed")
        warnings.warn(f"packc failed on a graph and leaves it unpacked; please report this: {error!r}", stacklevel=2)
        return _unpacked(gm, example_inputs, compile_inner, f"a pass failed: {error!r}")
    requirements = packed.requirements
    if config.strict and requirements.padded_mixers:
        raise NotPacked(f"packc cannot pack all of this graph: {requirements.padded_mixers[0]}")
    graph = fx.GraphModule(packed.gm, copy.deepcopy(packed.gm.graph))  # the inner backend may write to its own
    compiled = compile_inner(packed.gm, [*example_inputs, *index])
    call = PackedCall(
        compiled,
        graph,
        requirements,
        strict=strict,
        with_padding=packed.with_padding and compiled_when_called(packed.with_padding, mode, options or {}),
        positions=positions_inputs(gm),
        loss_outside=config.loss_outside or ends_in_a_graph_break(gm),
    )
    return call, GraphReport.packed(requirements, call)


def _unpacked(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    compile_inner: Callable[..., Any],
    reason: str,
    boundaries: Sequence[Boundary] = (),
) -> tuple[Callable[..., Any], GraphReport]:
    """The graph as it was; its mixers are packc's ops all the same."""
    log.info("not packed: %s", reason)
    compiled, positions = compile_inner(without_marks(gm), example_inputs), positions_inputs(gm)
    if positions and any(map(is_mixer, gm.graph.nodes)):
        compiled = UnpackedCall(compiled, positions)
    return compiled, GraphReport.unpacked(gm, reason, boundaries)


def pack_graph(gm: fx.GraphModule, example_inputs: list[Any]) -> tuple[Graph, tuple[Tensor, Tensor]]:
    """The packed form of a Dynamo graph, and fakes of its two further inputs, ``index`` and ``cu_seqlens``.

    Raises:
        NoMask, NotPackable: there is none; the message says why.
    """
    packed = packed_graph(Graph(gm, fakify(gm, example_inputs)))
    log.info("packed %d nodes into %d", len(gm.graph.nodes), len(packed.gm.graph.nodes))
    return packed, _index_fakes(packed.mask.meta["val"])


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
