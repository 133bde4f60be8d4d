"""Inputs of every mixer, as its declaration has them: for tests, benchmarks and ``python -m packc doctor``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from packc.ops.mixer import Mixer
from packc.ops.shapes import Shape


def inputs(mixer: Mixer, B: int, L: int, forms: Mapping[str, str] | None = None, **sizes: Any) -> dict[str, Tensor]:
    """Random arguments of ``packc.ops.<name>`` for ``B`` rows of ``L`` tokens: all that have gradients but states.

    They are fp32, on torch's default device, from its generator.

    Args:
        mixer: its declaration.
        B, L: rows and tokens.
        forms: of an argument with several shapes, which; by name.
        sizes: others than the declaration's example has, by letter.
    """
    known = {**mixer.example.sizes, **sizes, "B": B, "L": L}
    found = {}
    for name, shape in {**mixer.tensors, **mixer.before}.items():
        name = name.rstrip("?")
        if name in mixer.example.without:
            continue
        form = {**mixer.example.forms, **(forms or {})}.get(name, shape)
        x = torch.randn(Shape(form).of(known))
        found[name] = mixer.example.drawn[name](x) if name in mixer.example.drawn else x
    return found


def state_shape(mixer: Mixer, **sizes: Any) -> tuple[int, ...]:
    """Of one document's state, for such inputs."""
    return mixer.state_shape({**mixer.example.sizes, **sizes}, 1)[1:]


def in_dtype(mixer: Mixer, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The inputs of a model in ``dtype``, which keeps some in fp32."""
    keep = () if dtype is torch.float64 else mixer.example.fp32
    return {name: x if name in keep else x.to(dtype) for name, x in tensors.items()}
