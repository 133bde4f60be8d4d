"""Where batch and sequence live in every value of a padded graph.

A padded activation is ``(B, L, ...)``; its packed form is ``(1, T, ...)``: the same axes in the same order, with
``B -> 1`` and ``L -> T``. Flattened tokens ``(B*L, ...)`` become ``(T, ...)``. Axes are followed by rule from op to op,
never recognised by their size: B, L and a hidden size may well be equal.
"""

from __future__ import annotations

import enum
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true


class Axis(enum.Enum):
    """What an axis of a padded value ranges over."""

    OTHER = "."  # features, heads, ...: the same in both forms
    BATCH = "B"  # rows; 1 when packed
    SEQ = "L"  # positions; T when packed
    TOKENS = "BL"  # rows and positions flattened together; T when packed
    FLAT = "BL."  # and features with them, rows first: heads, normalised each on its own

    def __repr__(self) -> str:
        return self.value


OTHER, BATCH, SEQ, TOKENS, FLAT = Axis.OTHER, Axis.BATCH, Axis.SEQ, Axis.TOKENS, Axis.FLAT

Layout = tuple[Axis, ...]


class Whole(enum.Enum):
    """What a value without token axes is made of; it is one value, in whatever form it was computed."""

    SUM = "a sum over tokens"
    PER_DOCUMENT = "one per document"
    OF_OTHERS = "of another sequence's tokens"
    SAVED = "for the op's backward alone"


Kind = Layout | Whole
"""What a value is to the tokens. A value of neither kind, a weight, is the same everywhere."""


def covers_tokens(kind: Kind | None) -> TypeGuard[Layout]:
    """Whether a value has one entry per (row, position), and so has a packed form."""
    return isinstance(kind, tuple) and (TOKENS in kind or FLAT in kind or (BATCH in kind and SEQ in kind))


def show(kind: Kind | None) -> str:
    """``(B, L, .)``, for people."""
    if isinstance(kind, tuple):
        return "(" + ", ".join(axis.value for axis in kind) + ")"
    return "-" if kind is None else kind.value


def value_of(node: Any) -> Any:
    """The fake value of a node; anything else (a literal argument) is its own value."""
    return node.meta.get("val") if isinstance(node, fx.Node) else node


def is_tensor(arg: Any) -> bool:
    return isinstance(arg, fx.Node) and isinstance(arg.meta.get("val"), Tensor)


def is_made_of_integers(node: fx.Node) -> bool:
    """Whether everything that a value is made from is an input of integers or truths."""
    values = [each.meta.get("val") for each in inputs_of(node)]
    return node.op != "get_attr" and not any(isinstance(v, Tensor) and v.dtype.is_floating_point for v in values)


def inputs_of(node: fx.Node) -> set[fx.Node]:
    """The graph's inputs that a value is made from."""
    seen, queue = set[fx.Node](), [node]
    while queue:
        each = queue.pop()
        if each not in seen:
            seen.add(each)
            queue.extend(each.all_input_nodes)
    return {each for each in seen if each.op == "placeholder"}


def hint_of(size: Any) -> Any:
    """A size as the example has it; None where nobody knows before the graph runs."""
    return size.node.hint if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)) else size


def made_equal(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are equal; if they are in the example alone, both symbolic, from now on by a guard."""
    if same_size(a, b):
        return True
    symbolic = isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt)
    return symbolic and hint_of(a) is not None and hint_of(a) == hint_of(b) and bool(a == b)


def same_size(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are known to be equal; False when it would take a guard to find out."""
    return statically_known_true(a == b)
