"""What ops demand of their arguments, and say when they do not get it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from packc.ops import documents


def check_floating(op: str, tensors: Mapping[str, Tensor | None], like: Tensor) -> None:
    """Raises for tensors that are not floating, or not where ``like`` is."""
    for name, x in tensors.items():
        if x is not None and not x.is_floating_point():
            raise TypeError(f"{op}: {name} must be a floating-point tensor, not {x.dtype}")
        if x is not None and x.device != like.device:
            raise ValueError(f"{op}: {name} is on {x.device}, other arguments on {like.device}")


def check_shapes(
    op: str, tensors: Mapping[str, Tensor | None], wanted: Mapping[str, tuple[int, ...]], *given: str
) -> None:
    """Raises for shapes that are not as wanted. Sizes that only a run can tell are left to the kernels."""
    for name, shape in wanted.items():
        x = tensors[name]
        if x is None:
            continue
        if x.ndim != len(shape) or any(documents.differ(a, b) for a, b in zip(x.shape, shape, strict=True)):
            shapes = {other: tuple(y.shape) for other in given if (y := tensors[other]) is not None}
            others = " and ".join(f"{other} {size}" for other, size in shapes.items())
            raise ValueError(f"{op}: {name} must have shape {tuple(shape)}, not {tuple(x.shape)}, with {others}")
