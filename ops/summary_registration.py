"""What follows from a mixer's summary: ``packc::<name>_summary`` and ``packc::<name>_adjoint``.

::

    packc::<name>_summary(<takes>, Tensor begin) -> (Tensor transition, Tensor state)
        of tokens begin .. L:  h_out = transition h_in + state
    packc::<name>_adjoint(Tensor dout, <adjoint_takes>, Tensor end) -> Tensor dstate
        of tokens 0 .. end:  the gradient of the state that enters, from dout of these tokens alone

of the one row (B is 1) of a part of a packed sequence: a segment that ends where the part does, or begins with it.
``begin`` and ``end`` are int64 ``(1,)`` on the other tensors' device: values, so that one graph serves every segment.
Results have a leading axis of 1 and are fp32 (fp64 as soon as one tensor is). Of no tokens the transition is the
identity, and the states are zero. Tokens outside of the segment have no say, and on a CPU no cost: where nobody reads a
summary or an adjoint, its segment should have none.

They run by the implementations of the mixer, or by its reference where one of them has no ``summary`` or ``adjoint`` of
its own, and the declaration none; and have the reference's derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from packc.ops import derivatives, documents
from packc.ops.definition import define, schema
from packc.ops.flops import count_flops
from packc.ops.implementations import implementations, in_states_dtype
from packc.ops.mixer import Mixer, state_dtype
from packc.ops.shapes import Shape, Shapes, Sizes
from packc.ops.summary import Summary


def register(mixer: Mixer, summary: Summary) -> None:
    """The two ops of ``mixer``."""

    def state(sizes: Sizes, like: Tensor, dtype: torch.dtype) -> Tensor:
        return like.new_empty(mixer.state_shape(sizes, 1), dtype=dtype)

    def transition_and_state(sizes: Sizes, like: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        transition = like.new_empty((1, *Shape(summary.transition).of(sizes)), dtype=dtype)
        return transition, state(sizes, like, dtype)

    def op(what: str, arguments: Mapping[str, str], like: str, run: Callable[..., Any] | None, **others: Any) -> None:
        tensors = {name: mixer.shape_of[name] for name in arguments if name in mixer.shape_of}
        if like == "dout":
            tensors = {"dout": mixer.shape_of_out, **tensors}
        shapes = Shapes(f"{mixer.name}_{what}", tensors, like, mixer.groups, _check_row(like))
        _define(mixer, what, shapes, arguments, run, **others)

    op(
        "summary",
        mixer.summary_arguments,
        mixer.like,
        summary.summary,
        returns="(Tensor transition, Tensor state)",
        results=transition_and_state,
        flops=summary.flops,
    )
    op(
        "adjoint",
        mixer.adjoint_arguments,
        "dout",
        summary.adjoint,
        returns="Tensor",
        results=state,
        flops=summary.adjoint_flops,
    )


def _define(
    mixer: Mixer,
    what: str,
    shapes: Shapes,
    arguments: Mapping[str, str],
    run: Callable[..., Any] | None,
    returns: str,
    results: Callable[[Sizes, Tensor, torch.dtype], Any],
    flops: Callable[..., int],
) -> None:
    """``results`` are a fake's, for sizes, a tensor on their device and their dtype."""
    name, places = shapes.op, list(arguments)
    tensors_of = itemgetter(*map(places.index, shapes.shapes))
    like = places.index(shapes.like)
    converted = in_states_dtype(mixer, arguments)
    implementation = implementations(mixer) if run is not None else _implementations(mixer, what)

    def kernel(*args: Any) -> Any:
        tensors = tensors_of(args)
        shapes.check_sizes(tensors, None)
        _check_place(name, places[-1], args[-1], args[like])
        dtype = state_dtype(*tensors)
        kernels, given = implementation(dtype, args[like]), converted(args, dtype)
        return run(kernels, *given) if run is not None else getattr(kernels, what)(*given)

    def fake(*args: Any) -> Any:
        tensors = dict(zip(shapes.shapes, tensors_of(args), strict=True))
        return results(shapes.sizes_of(tensors), args[like], state_dtype(*tensors.values()))

    define(schema(name, arguments, returns), kernel, fake)
    count_flops(name, flops, shapes, arguments, mixer.options)
    derivatives.register_gradients(name, kernel)


def _implementations(mixer: Mixer, what: str) -> Callable[[torch.dtype, Tensor], Any]:
    implementation = implementations(mixer)

    def with_reference(dtype: torch.dtype, like: Tensor) -> Any:
        kernels = implementation(dtype, like)
        return kernels if hasattr(kernels, what) else implementation(torch.float64, like)

    return with_reference


# ---- what is said of arguments that do not fit -----------------------------------------------------------------------


def _check_row(like: str) -> Callable[..., None]:
    def check(op: str, tensors: Mapping[str, Tensor], _: None) -> None:
        shape = tensors[like].shape
        if len(shape) < 2 or documents.differ(shape[0], 1):
            raise ValueError(f"{op}: {like} must be one row (1, L, ...), not {tuple(shape)}")

    return check


def _check_place(op: str, name: str, place: Tensor, like: Tensor) -> None:
    if place.dtype is not torch.int64:
        raise TypeError(f"{op}: {name} must be int64, not {place.dtype}")
    if place.shape != (1,):
        raise ValueError(f"{op}: {name} must have shape (1,), not {tuple(place.shape)}")
    if place.device != like.device:
        raise ValueError(f"{op}: {name} is on {place.device}, the other tensors on {like.device}")
    # On CUDA its value is not looked at, which would wait for the device.
    if place.is_cpu and not 0 <= place.item() <= like.shape[1]:
        raise ValueError(f"{op}: {name} must lie between 0 and L = {like.shape[1]}, not be {place.item()}")
