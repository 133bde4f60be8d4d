"""Shapes of an op's arguments as its declaration has them, and what is said of arguments that have others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from packc.ops import documents

Sizes = dict[str, Any]
"""By name. Of ``*D`` a tuple: D has any number of axes."""

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PLAIN = (Tensor, torch.nn.Parameter)  # whose sizes are numbers


class Shape:
    """``"H | H P"``, ``"B L *D"`` or ``"D W-1"``: names of sizes, by the number of axes."""

    def __init__(self, text: str) -> None:
        self.forms = [tuple(form.replace("*", "").split()) for form in text.split("|")]
        self._by_rank = {len(form): form for form in self.forms}
        self._open = "*" in text

    def named(self, shape: Sequence[int]) -> Iterable[tuple[str, Any]] | None:
        """Each name with its size; None for a number of axes that there cannot be."""
        form = self.forms[0] if self._open else self._by_rank.get(len(shape))
        if form is None or len(shape) < len(form) - 1:
            return None
        return zip(form, self._closed(shape) if self._open else shape, strict=True)

    def _closed(self, shape: Sequence[int]) -> tuple[Any, ...]:
        fixed = len(self.forms[0]) - 1
        return (*shape[:fixed], tuple(shape[fixed:]))

    def of(self, sizes: Sizes, rank: int | None = None) -> tuple[int, ...]:
        """The shape, of the form that has ``rank`` axes or else the first."""
        form = self.forms[0] if rank is None else self._by_rank.get(rank, self.forms[0])
        shape = tuple([sizes[name] if name in sizes else sizes[name.removesuffix("-1")] - 1 for name in form])
        return (*shape[:-1], *shape[-1]) if self._open else shape

    def shown(self, form: int = 0) -> str:
        """For people: ``(B, L, ...)``."""
        names = self.forms[form]
        return f"({', '.join((*names[:-1], '...') if self._open else names)})"


class Groups(NamedTuple):
    """The size ``inner`` divides the size ``outer``."""

    inner: str
    outer: str
    otherwise: str
    """What is said if not; a format of all sizes."""


class Shapes:
    """Of the arguments of one op, in order; all are held against one of them."""

    def __init__(
        self,
        op: str,
        shapes: Mapping[str, str],
        like: str,
        groups: Groups | None = None,
        before: Callable[..., None] | None = None,
    ) -> None:
        self.op, self.groups, self._before = op, groups, before
        self.shapes = {name: Shape(text) for name, text in shapes.items()}
        self.like = like
        # What was checked last: the layers of a model are called with the same shapes.
        self._checked: list[Any] = []
        # Of the last two: an op and its backward may have other states.
        self._sizes_checked: list[list[Any]] = []
        self._defining: list[str] = []  # those that bring a new size
        known = {"documents"}
        for name in (like, *shapes):
            sizes = {size.removesuffix("-1") for form in self.shapes[name].forms for size in form}
            if not sizes <= known:
                self._defining.append(name)
            known |= sizes
        # Of either of two forms, and of the same one.
        pairs = [(text, [name for name in shapes if shapes[name] == text]) for text in shapes.values() if "|" in text]
        self._alike = [names for _, names in dict(pairs).items() if len(names) > 1]

    def sizes(self, shapes: Mapping[str, Sequence[int] | None]) -> Sizes:
        """By name, of arguments that fit."""
        found: Sizes = {}
        for name in self._defining:
            if (shape := shapes[name]) is not None:
                found = dict(self.shapes[name].named(shape) or ()) | found
        return found

    def sizes_of(self, tensors: Mapping[str, Tensor | None]) -> Sizes:
        return self.sizes({name: None if x is None else x.shape for name, x in tensors.items()})

    def check(self, tensors: Mapping[str, Tensor | None], cu_seqlens: Tensor | None) -> None:
        """Raises for arguments that do not fit. Sizes that only a run can tell are left to :meth:`check_sizes`."""
        if torch.compiler.is_dynamo_compiling() or type(tensors[self.like]) not in _PLAIN:
            self._explain(tensors, cu_seqlens)
            return
        given = [None if x is None else (x.shape, x.dtype, x.device) for x in (cu_seqlens, *tensors.values())]
        if given != self._checked:
            self._explain(tensors, cu_seqlens)
            self._checked = given

    def check_sizes(self, tensors: Sequence[Tensor | None], cu_seqlens: Tensor | None) -> None:
        """Raises for sizes that do not fit, all of them numbers, of the arguments in their order."""
        given = [None if x is None else x.shape for x in (cu_seqlens, *tensors)]
        if given not in self._sizes_checked:
            self._explain(dict(zip(self.shapes, tensors)), cu_seqlens)  # noqa: B905  not those used up before
            self._sizes_checked = [given, *self._sizes_checked[:1]]

    def _explain(self, tensors: Mapping[str, Tensor | None], cu_seqlens: Tensor | None) -> None:
        like = tensors[self.like]
        assert like is not None
        if self._before is not None:
            self._before(self.op, tensors, cu_seqlens)
        for name, x in tensors.items():
            if x is not None and not x.is_floating_point():
                raise TypeError(f"{self.op}: {name} must be a floating-point tensor, not {x.dtype}")
            if x is not None and x.device != like.device:
                raise ValueError(f"{self.op}: {name} is on {x.device}, {self.like} on {like.device}")
        sizes = self._sizes(tensors)
        documents.check_cu_seqlens(cu_seqlens, like, self.like)
        sizes["documents"] = documents.count(cu_seqlens, like)
        for name, x in tensors.items():
            if x is None:
                continue
            wanted = self.shapes[name].of(sizes, x.ndim)
            if x.ndim != len(wanted) or any(documents.differ(a, b) for a, b in zip(x.shape, wanted, strict=True)):
                given = {other: tensors[other] for other in self._defining}
                others = " and ".join(f"{other} {tuple(y.shape)}" for other, y in given.items() if y is not None)
                raise ValueError(f"{self.op}: {name} must have shape {wanted}, not {tuple(x.shape)}, with {others}")

    def _sizes(self, tensors: Mapping[str, Tensor | None]) -> Sizes:
        """Those that the others must have."""
        for names in self._alike:
            given = [x for name in names if (x := tensors[name]) is not None]
            if len({x.ndim for x in given}) > 1 or any(self.shapes[names[0]].named(x.shape) is None for x in given):
                either = " or both ".join(map(self.shapes[names[0]].shown, range(2)))
                shapes = " and ".join(str(tuple(x.shape)) for x in given)
                raise ValueError(f"{self.op}: {' and '.join(names)} must both be {either}, not {shapes}")
        sizes: Sizes = {}
        for name in self._defining:
            x = tensors[name]
            if x is None:
                continue
            named = self.shapes[name].named(x.shape)
            if named is None:
                raise ValueError(f"{self.op}: {name} must be {self.shapes[name].shown()}, not {tuple(x.shape)}")
            for size_name, size in named:
                sizes.setdefault(size_name, size)
        if self.groups is not None and self.groups.inner in sizes:
            inner, outer = sizes[self.groups.inner], sizes[self.groups.outer]
            if documents.differ(outer % inner if inner else outer, 0):
                raise ValueError(f"{self.op}: {self.groups.otherwise.format_map(sizes)}")
        return sizes
