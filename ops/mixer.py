"""What a mixer is: an op that looks along the tokens of a document, declared once, where its op is defined.

From its declaration follow the op ``torch.ops.packc.<name>`` and its ``_bwd`` (``registration.py``), and what passes
know of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from packc.ops.definition import schema
from packc.ops.shapes import Groups, Shape, Shapes, Sizes
from packc.ops.summary import Summary


@dataclass(frozen=True)
class Example:
    """Small inputs with values as models have them (``testing.py``)."""

    sizes: Mapping[str, Any]
    """But B and L, by letter."""
    drawn: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    """Of tensors whose values are not normal: what makes them of normal ones."""
    forms: Mapping[str, str] = field(default_factory=dict)
    """Of tensors with several shapes: which, if not the first."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of ``packc.ops.<name>``."""
    fp32: tuple[str, ...] = ()
    """Tensors that models keep in fp32 when all others are bf16."""
    without: tuple[str, ...] = ()
    """Optional tensors that are not drawn."""


@dataclass(frozen=True, eq=False)
class Mixer:
    """``torch.ops.packc.<name>``. It never looks ahead, and a state of zero stays zero if tokens add nothing to it.

    Its arguments, in order: ``tensors``, ``options``, ``cu_seqlens``, and of an op with states ``initial_state`` and
    ``output_final_state``; without states ``cu_seqlens`` is no option and stands before the options. Its results:
    ``out``, of an op with states ``final_state`` (of no document unless asked for), and what it ``keeps``.

    Shapes are sizes by name: ``"B L H P"``, with ``B`` rows of ``L`` tokens. ``"H | H P"`` is either; ``"B L *D"`` has
    any axes behind.
    """

    name: str
    tensors: Mapping[str, str]
    """Name and shape of each; ``"name?"`` may be None. Those that begin with B and L are per token."""
    like: str
    """The tensor whose dtype and device are ``out``'s, and whose shape is, unless ``out`` is given."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Arguments without a gradient: name and type, as a schema has it."""
    out: str = ""
    """Shape of ``out``."""
    state: str | None = None
    """Shape of a document's state, in the state's dtype: fp32, or fp64 as soon as one tensor is."""
    enter_state: tuple[str, ...] = ()
    """Arguments of which any one, if zero at a token, keeps it out of the state: for a convolution, its window."""
    gives_zero: tuple[str, ...] = ()
    """Arguments of which any one, if zero at a token and before it, makes its result zero there, from no state on."""
    unless: tuple[str, ...] = ()
    """Arguments with which it does not."""
    keeps: Mapping[str, str | Callable[..., int]] = field(default_factory=dict)
    """What the backward gets of the forward beside its arguments, in the state's dtype: name, and shape or length (of
    the sizes, by name); ``"out"`` is ``out``."""
    in_state_dtype: tuple[str, ...] = ()
    """Tensors that kernels get in the state's dtype, as they do states: few values, on which everything hangs."""
    before: Mapping[str, str] = field(default_factory=dict)
    """Tensors that ``packc.ops.<name>`` takes as well, and uses up before it calls the op."""
    groups: Groups | None = None
    """Heads or channels that share something."""
    check: Callable[..., None] | None = None
    """``(op, tensors by name, cu_seqlens)``: raises, before anything else does, in an op's own words."""
    own_layout: tuple[str, ...] = ()
    """Tensors whose gradients lie in memory as they do: channel-first, if they are."""
    tags: tuple[torch.Tag, ...] = ()
    example: Example = field(kw_only=True)
    flops: Callable[..., int] = field(kw_only=True)
    """Of the sizes and options, by name."""
    backward_flops: Callable[..., int] = field(kw_only=True)
    kernels: str = ""
    """Of which op they are, if not of this one: of its folder the functions ``forward`` and ``backward`` in
    ``reference.py`` and ``triton_op.py``, imported when first wanted, and what ``csrc`` has of that name."""
    implementations: Mapping[str, Any] | None = None
    """Instead of these: by the names in ``packc.config.kernels``."""
    choose: Callable[[str, Tensor], str] | None = None
    """Which of them runs for ``kernels`` and a tensor ``like``, if not ``dispatch.choose``."""
    forward: Callable[..., tuple[Tensor, ...]] | None = None
    """``(kernels, *arguments) -> results``, where kernels want their arguments in another way."""
    backward: Callable[..., Sequence[Tensor | None]] | None = None
    """``(kernels, *arguments of the _bwd op) -> gradients`` of the tensors and the initial state."""

    summary: Summary | None = None
    """What a segment of a document does to the state that enters it, if that is affine in the state."""

    # ---- what follows ------------------------------------------------------------------------------------------------

    @cached_property
    def shape_of(self) -> dict[str, str]:
        """Of each tensor: its shape, by name."""
        return {name.rstrip("?"): shape for name, shape in self.tensors.items()}

    @cached_property
    def shape_of_out(self) -> str:
        return self.out or self.shape_of[self.like]

    @cached_property
    def tensor_names(self) -> tuple[str, ...]:
        return tuple(self.shape_of)

    @cached_property
    def per_token(self) -> tuple[str, ...]:
        """Arguments ``(B, L, ...)``."""
        return tuple(name for name, shape in self.shape_of.items() if "B L" in shape)

    @cached_property
    def differentiable(self) -> tuple[str, ...]:
        return (*self.tensor_names, "initial_state") if self.state is not None else self.tensor_names

    @cached_property
    def arguments(self) -> dict[str, str]:
        """Of the op: types by name, in order."""
        tensors = {name.rstrip("?"): "Tensor?" if name.endswith("?") else "Tensor" for name in self.tensors}
        if self.state is None:
            return {**tensors, "cu_seqlens": "Tensor", **self.options}
        states = {"cu_seqlens": "Tensor?", "initial_state": "Tensor?", "output_final_state": "bool"}
        return {**tensors, **self.options, **states}

    @cached_property
    def backward_arguments(self) -> dict[str, str]:
        """Of the ``_bwd`` op."""
        kept = dict.fromkeys(self.keeps, "Tensor")
        arguments = {name: kind for name, kind in self.arguments.items() if name != "output_final_state"}
        # The layout is an argument: strides of a traced tensor need not be those of a later run.
        layouts = {f"channel_first_d{name}": "bool" for name in self.own_layout}
        if self.state is None:
            tensors = {name: arguments.pop(name) for name in self.tensor_names}
            return {"dout": "Tensor", **tensors, **kept, **arguments}
        return {"dout": "Tensor", "dfinal_state": "Tensor?", **kept, **arguments, **layouts}

    def _taken(self, names: Sequence[str]) -> dict[str, str]:
        arguments = self.arguments
        return {name: arguments[name] for name in names}

    @cached_property
    def summary_arguments(self) -> dict[str, str]:
        """Of the ``_summary`` op: types by name, in order."""
        assert self.summary is not None
        return {**self._taken(self.summary.takes), "begin": "Tensor"}

    @cached_property
    def adjoint_arguments(self) -> dict[str, str]:
        """Of the ``_adjoint`` op."""
        assert self.summary is not None
        return {"dout": "Tensor", **self._taken(self.summary.adjoint_takes), "end": "Tensor"}

    @cached_property
    def enter_arguments(self) -> dict[str, str]:
        """Of the ``_enter`` op."""
        assert self.summary is not None
        assert self.summary.late is not None
        results = {name: f"Tensor({name}!)" for name in self.results}
        taken = self._taken(self.summary.late.enter_takes)
        return {**results, "entering": "Tensor", **taken, "end": "Tensor", "document": "Tensor"}

    @cached_property
    def leave_arguments(self) -> dict[str, str]:
        """Of the ``_leave`` op."""
        assert self.summary is not None
        late = self.summary.late
        assert late is not None
        gradients = {f"d{name}": f"Tensor(d{name}!)" for name in late.leave_changes}
        taken = self._taken(late.leave_takes)
        return {**gradients, "leaving": "Tensor", "before": "Tensor", **taken, "begin": "Tensor"}

    @cached_property
    def results(self) -> tuple[str, ...]:
        states = ("final_state",) if self.state is not None else ()
        return ("out", *states, *(name for name in self.keeps if name != "out"))

    def schemas(self) -> tuple[str, str]:
        """Of the op and of its ``_bwd``."""
        results = ", ".join(f"Tensor {name}" for name in self.results)
        gradients = ", ".join(f"Tensor d{name}" for name in self.differentiable)
        forward = schema(self.name, self.arguments, f"({results})")
        return forward, schema(f"{self.name}_bwd", self.backward_arguments, f"({gradients})")

    @cached_property
    def shapes(self) -> Shapes:
        """Of all that have gradients, and of those used up before."""
        states = {} if self.state is None else {"initial_state": f"documents {self.state}"}
        return Shapes(self.name, {**self.shape_of, **states, **self.before}, self.like, self.groups, self.check)

    def out_shape(self, sizes: Sizes) -> tuple[int, ...]:
        return Shape(self.shape_of_out).of(sizes)

    def state_shape(self, sizes: Sizes, documents: int) -> tuple[int, ...]:
        """Of the states of so many documents."""
        assert self.state is not None
        return (documents, *Shape(self.state).of(sizes))

    def kept_shape(self, name: str, sizes: Sizes) -> tuple[int, ...]:
        shape = self.keeps[name]
        return Shape(shape).of(sizes) if isinstance(shape, str) else (shape(**sizes),)


def state_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 as soon as one argument is, else fp32."""
    for x in tensors:
        if x is not None and x.dtype is torch.float64:
            return torch.float64
    return torch.float32


MIXERS: dict[str, Mixer] = {}
"""All that are declared."""
