"""The form from which every graph comes: ``(B, L, ...)``, one document a row."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from packc.passes.axes import BATCH, SEQ, Axis, Layout
from packc.passes.forms.form import Write
from packc.passes.reading import Call


class Padded:
    is_part = False

    def __init__(self, write: Write, mask: fx.Node, shape: Any) -> None:
        sizes = [s if isinstance(s, int) else write(torch.ops.aten.sym_size.int, mask, d) for d, s in enumerate(shape)]
        self.batch, self.length = sizes

    def size(self, axis: Axis) -> Any:
        assert axis in (BATCH, SEQ), f"rows and positions are counted apart, not as {axis}"
        return self.batch if axis is BATCH else self.length

    def enter(self, padded: fx.Node, layout: Layout, shape: Any, *, by_position: bool = False) -> fx.Node:
        return padded

    def leave(self, value: fx.Node, layout: Layout, shape: Any) -> fx.Node:
        return value

    def mixer(self, call: Call) -> Call:
        return call

    def total(self, value: fx.Node) -> fx.Node:
        return value
