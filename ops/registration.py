"""What follows from a mixer's declaration: ``packc::<name>`` and ``packc::<name>_bwd``, with fakes, FLOPs and autograd.

What follows from its summary is in ``summary_registration.py``, ``fold_registration.py`` and ``late_registration.py``.

A call goes down like this, every step of it decided when it runs::

    packc.ops.ssd                       checks its arguments (ops/ssd/__init__.py)
    packc::ssd      key Autograd        a node of autograd's graph if one is wanted (ops/derivatives.py)
    packc::ssd      key CPU, CUDA       looks at sizes, chooses an implementation, brings states in their dtype, and
                                        runs it (:func:`_forward`)
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from packc.ops import autograd, derivatives, documents, fold_registration, late_registration, summary_registration
from packc.ops.definition import define
from packc.ops.flops import count_flops
from packc.ops.implementations import implementations, in_states_dtype
from packc.ops.mixer import MIXERS, Mixer, state_dtype


def declare(mixer: Mixer) -> Mixer:
    """Registers the ops of ``mixer``."""
    assert mixer.name not in MIXERS, f"two declarations of {mixer.name}"
    MIXERS[mixer.name] = mixer
    kernels, fakes = (_forward(mixer), _backward(mixer)), (_forward_fake(mixer), _backward_fake(mixer))
    for schema, kernel, fake in zip(mixer.schemas(), kernels, fakes, strict=True):
        define(schema, kernel, fake, mixer.tags)
    name, name_bwd = mixer.name, f"{mixer.name}_bwd"
    count_flops(name, mixer.flops, mixer.shapes, mixer.arguments, mixer.options)
    count_flops(name_bwd, mixer.backward_flops, mixer.shapes, mixer.backward_arguments, mixer.options)
    forward, backward = kernels
    derivatives.register(name, forward, *_differentiation(mixer, backward))
    derivatives.register_gradients(name_bwd, backward)
    if mixer.summary is not None:
        summary_registration.register(mixer, mixer.summary)
        fold_registration.register(mixer, mixer.summary)
        if mixer.summary.late is not None:
            late_registration.register(mixer, mixer.summary.late)
    return mixer


# ---- kernels ---------------------------------------------------------------------------------------------------------


def _forward(mixer: Mixer) -> Callable[..., tuple[Tensor, ...]]:
    prepare, run = _preparation(mixer, mixer.arguments), mixer.forward
    like = mixer.differentiable.index(mixer.like)

    def forward(*args: Any) -> tuple[Tensor, ...]:
        kernels, given, tensors = prepare(args)
        results = run(kernels, *given) if run is not None else kernels.forward(*given)
        dtype = tensors[like].dtype
        return results if results[0].dtype is dtype else (results[0].to(dtype), *results[1:])

    return forward


def _backward(mixer: Mixer) -> Callable[..., tuple[Tensor, ...]]:
    prepare, run = _preparation(mixer, mixer.backward_arguments), mixer.backward
    like = mixer.differentiable.index(mixer.like)

    def backward(*args: Any) -> tuple[Tensor, ...]:
        """All contiguous and in their arguments' dtypes; empty for an absent argument."""
        kernels, given, tensors = prepare(args)
        found = run(kernels, *given) if run is not None else kernels.backward(*given)
        results = []
        for x, grad in zip(tensors, found, strict=True):
            if x is None or grad is None:
                results.append(torch.empty(0, dtype=tensors[like].dtype, device=tensors[like].device))
            else:
                results.append(grad if grad.dtype is x.dtype else grad.to(x.dtype))
        return tuple(results)

    return backward


def _preparation(mixer: Mixer, arguments: dict[str, str]) -> Callable[[tuple[Any, ...]], tuple[Any, list[Any], Any]]:
    """Of the arguments of one of the ops: an implementation, what it gets, and the tensors that have gradients."""
    places = list(arguments)
    names, shapes = mixer.differentiable, mixer.shapes
    tensors_of = itemgetter(*map(places.index, names))
    cu_seqlens, like = places.index("cu_seqlens"), places.index(mixer.like)
    implementation, converted = implementations(mixer), in_states_dtype(mixer, places)

    def prepare(args: tuple[Any, ...]) -> tuple[Any, list[Any], Any]:
        tensors = tensors_of(args)
        shapes.check_sizes(tensors, args[cu_seqlens])
        dtype = state_dtype(*tensors)
        return implementation(dtype, args[like]), converted(args, dtype), tensors

    return prepare


# ---- fakes -----------------------------------------------------------------------------------------------------------


def _forward_fake(mixer: Mixer) -> Callable[..., tuple[Tensor, ...]]:
    def forward(*args: Any) -> tuple[Tensor, ...]:
        given = dict(zip(mixer.arguments, args, strict=True))
        like, sizes = given[mixer.like], mixer.shapes.sizes_of({name: given[name] for name in mixer.tensor_names})
        dtype = state_dtype(*(given[name] for name in mixer.differentiable))
        results = [like.new_empty(mixer.out_shape(sizes))]
        if mixer.state is not None:
            states = documents.count(given["cu_seqlens"], like) if given["output_final_state"] else 0
            results.append(like.new_empty(mixer.state_shape(sizes, states), dtype=dtype))
        kept = (mixer.kept_shape(name, sizes) for name in mixer.keeps if name != "out")
        return (*results, *(like.new_empty(shape, dtype=dtype) for shape in kept))

    return forward


def _backward_fake(mixer: Mixer) -> Callable[..., tuple[Tensor, ...]]:
    def backward(*args: Any) -> tuple[Tensor, ...]:
        given = dict(zip(mixer.backward_arguments, args, strict=True))

        def gradient(name: str) -> Tensor:
            x = given[name]
            if x is None:
                return given[mixer.like].new_empty(0)
            if given.get(f"channel_first_d{name}"):
                return x.new_empty(x.mT.shape).mT
            return x.new_empty(x.shape)

        return tuple(map(gradient, mixer.differentiable))

    return backward


# ---- autograd --------------------------------------------------------------------------------------------------------


def _differentiation(mixer: Mixer, kernel: Callable[..., Any]) -> tuple[Callable[..., None], Callable[..., Any]]:
    """How a node of autograd's graph keeps what the ``_bwd`` op wants, and calls it. ``kernel``: that op's."""
    backward_op = getattr(torch.ops.packc, f"{mixer.name}_bwd").default
    below = derivatives.below_autograd(backward_op, kernel)
    names, results = list(mixer.arguments), mixer.results
    tensors = [n for n, kind in enumerate(mixer.arguments.values()) if kind.startswith("Tensor")]
    others = [n for n in range(len(names)) if n not in tensors]
    kept = [results.index(name) for name in mixer.keeps]
    unknown = [results.index(name) for name in mixer.keeps if name != "out"]  # has no derivative

    # What there is in the backward, in this order, and where in it each argument of the op is.
    there = [*(names[n] for n in tensors), *mixer.keeps, *(names[n] for n in others), "dout", "dfinal_state"]
    there += [f"channel_first_d{name}" for name in mixer.own_layout]
    arguments = itemgetter(*map(there.index, mixer.backward_arguments))
    like, own_layout = there.index(mixer.like), [there.index(name) for name in mixer.own_layout]
    # Of each argument of the op: where the argument is in that, and its gradient among the results.
    gradients = [
        (there.index(name), mixer.differentiable.index(name)) if name in mixer.differentiable else None
        for name in names
    ]

    def setup_context(ctx: Any, args: tuple[Any, ...], found: tuple[Tensor, ...]) -> None:
        ctx.others = [args[n] for n in others]
        ctx.save_for_backward(*[args[n] for n in tensors], *[found[n] for n in kept])
        ctx.mark_non_differentiable(*[found[n] for n in unknown])
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, *douts: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        dout = douts[0]
        if dout is None:
            sizes = mixer.shapes.sizes_of(dict(zip(mixer.tensor_names, saved)))  # noqa: B905  nor what was kept
            dout = saved[like].new_zeros(mixer.out_shape(sizes))
        # Of states that nobody asked for there are none.
        dfinal = douts[1] if mixer.state is not None and ctx.others[-1] else None
        given = (*saved, *ctx.others, dout, dfinal, *[is_channel_first(saved[n]) for n in own_layout])
        # What was kept has no tangents: with one, there would be no node.
        differentiated = torch.is_grad_enabled() or autograd.under_a_transform() or autograd.tangents_given(*douts)
        grads = (backward_op if differentiated else below)(*arguments(given))
        return tuple([None if at is None or saved[at[0]] is None else grads[at[1]] for at in gradients])

    return setup_context, backward


def is_channel_first(x: Tensor) -> bool:
    return statically_known_true(x.stride(1) == 1) and not statically_known_true(x.stride(2) == 1)
