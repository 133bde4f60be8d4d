"""Padded graph -> packed graph: inputs gathered once, ops on ``(1, T, ...)``, outputs scattered once."""

from __future__ import annotations

import logging
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from packc.passes.axes import BATCH, OTHER, SEQ, TOKENS, Layout, same_size, value_of
from packc.passes.forms import Forms, choose_forms, is_computed_packed, packed_form, reads_as_is, switches_mode
from packc.passes.labels import IgnoredLabels, ignored_labels
from packc.passes.module_names import module_path
from packc.passes.normalize import carry_over_from_dynamo
from packc.passes.reasons import Boundary, NotPackable
from packc.passes.rules import PackedForm, Placeholder
from packc.passes.sequences import other_masks
from packc.passes.sources import argument_path
from packc.passes.unpacked import boundaries_of, padded_mixers

log = logging.getLogger(__name__)
aten = torch.ops.aten


@dataclass
class Packed:
    """What a packed graph asks of each batch; found in its ``meta["packc"]``."""

    mask: int
    """Position of the mask among the inputs. ``index`` and ``cu_seqlens`` follow after the last of them."""
    other_masks: list[int] = field(default_factory=list)
    """Positions of further masks of the same tokens; rows of which one marks tokens where the mask has padding are not
    packed."""
    outside: str | None = None
    """The reason of such rows."""
    keep_left: str | None = None
    """Why left padding stays in the pack; None: it is left out."""
    keep_right: str | None = None
    labels: list[IgnoredLabels] = field(default_factory=list)
    returns_tokens: bool = False
    """Whether some output has values of tokens, zero at padding."""
    mixers: list[tuple[str, str]] = field(default_factory=list)
    """(op, module path) of each packed mixer."""
    padded_mixers: list[Boundary] = field(default_factory=list)
    """The others, and why they run padded."""
    boundaries: list[Boundary] = field(default_factory=list)


def pack(gm: fx.GraphModule, *, mask: fx.Node, zero: set[fx.Node]) -> fx.GraphModule:
    """Rewrite a graph with layouts into its packed form, with two more inputs: ``index``, ``cu_seqlens``.

    Outputs keep size, dtype and strides; their padded positions are zero. Exact under the conditions listed in the
    result's ``meta["packc"]`` (:class:`Packed`), which hold batch by batch or not.

    Args:
        gm: a graph with layouts.
        mask: its padding mask.
        zero: values known to be zero at padding.

    Raises:
        NotPackable: no packed graph computes the same.
    """
    forms = choose_forms(gm, zero=zero)
    requirements = _requirements(gm, forms, zero, mask)
    if not any(packed_form(node) for node in forms.packed):
        raise NotPackable("; ".join(["nothing in the graph works on tokens", *_unpacked_reasons(gm)]))
    packed = _Emitter(gm, forms, mask).run()
    packed.meta["packc"] = requirements
    return packed


def _unpacked_reasons(gm: fx.GraphModule) -> list[str]:
    return [f"{n.target}: {n.meta['unpacked_because']}" for n in gm.graph.nodes if "unpacked_because" in n.meta][:3]


def _requirements(gm: fx.GraphModule, forms: Forms, zero: set[fx.Node], mask: fx.Node) -> Packed:
    inputs = gm.graph.find_nodes(op="placeholder")
    name, others = argument_path(mask), other_masks(gm, mask, zero)
    result = Packed(
        mask=inputs.index(mask),
        other_masks=[inputs.index(other) for other in others],
        padded_mixers=padded_mixers(gm, forms.packed, name),
        boundaries=boundaries_of(gm),
    )
    if others:
        result.outside = f"{', '.join(map(argument_path, others))} marks tokens where {name} has padding"
    for node in gm.graph.nodes:
        form = packed_form(node)
        if form is None or node not in forms.packed:
            continue
        if form.is_mixer:
            result.mixers.append((str(node.target), module_path(node)))
        keep_left = form.keep_left
        if form.keep_left_unless_zero is not None and form.keep_left_unless_zero[0] not in zero:
            keep_left = form.keep_left_unless_zero[1]
        if keep_left is not None:
            result.keep_left = result.keep_left or f"{module_path(node) or 'the model'}: {keep_left}"
        if form.keep_right is not None:
            result.keep_right = result.keep_right or f"{module_path(node) or 'the model'}: {form.keep_right}"
    result.labels = ignored_labels(gm, forms)
    returned = gm.graph.output_node().all_input_nodes
    result.returns_tokens = any(node in forms.packed and not reads_as_is(node) for node in returned)
    return result


class _Emitter:
    """Writes the packed graph in the order of the padded one, each node in the forms that are wanted."""

    def __init__(self, gm: fx.GraphModule, forms: Forms, mask: fx.Node) -> None:
        self.gm, self.forms, self.mask = gm, forms, mask
        self.graph = fx.Graph()
        self.padded: dict[fx.Node, fx.Node] = {}
        self.packed: dict[fx.Node, fx.Node] = {}
        # Keyed by region too: under no_grad a gather has no gradient, so it must not serve the code around.
        self.gathered: dict[tuple[fx.Node, Layout, int], fx.Node] = {}
        self.region = 0
        self.indices: dict[str, fx.Node] = {}
        self.origin: fx.Node | None = None  # the padded node being written: its metadata goes to all it becomes

    def run(self) -> fx.GraphModule:
        placeholders = self.gm.graph.find_nodes(op="placeholder")
        for node in placeholders:
            self.padded[node] = self.graph.node_copy(node)
        self.index = self.graph.placeholder("packc_index")
        self.cu_seqlens = self.graph.placeholder("packc_cu_seqlens")
        self.tokens = self._call(aten.sym_size.int, (self.index, 0))
        self.batch, self.length = (self._size_of_mask(axis) for axis in (0, 1))
        for node in self.gm.graph.nodes:
            self.origin = node
            if node.op == "output":
                self.graph.output(fx.map_arg(node.args[0], self._as_output))
            elif node.op != "placeholder":
                self.region += switches_mode(node)
                if node in self.forms.padded and node not in self.forms.packed_only:
                    self._emit_padded(node)
                if node in self.forms.packed:
                    self._emit_packed(node)
                    if node in self.forms.padded:
                        self._padded(node)
        self.graph.lint()
        packed = fx.GraphModule(self.gm, self.graph)
        carry_over_from_dynamo(self.gm, packed)
        return packed

    def _size_of_mask(self, axis: int) -> Any:
        size = self.mask.meta["val"].shape[axis]
        return size if isinstance(size, int) else self._call(aten.sym_size.int, (self.padded[self.mask], axis))

    def _call(self, target: Any, args: tuple, kwargs: dict | None = None) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs or {})
        if self.origin is not None:
            node.meta = {k: v for k, v in self.origin.meta.items() if k in _CARRIED_META}
        return node

    def _emit_padded(self, node: fx.Node) -> None:
        if packed_form(node) is not None and reads_as_is(node):
            return  # written once, by its packed form
        if node.target is aten.sym_size.int and node.args[0] in self.forms.packed_only:
            self.padded[node] = self._padded_size(*node.args)  # type: ignore[arg-type]
            return
        copied = self.graph.node_copy(node, self._padded)
        copied.meta = {k: v for k, v in node.meta.items() if k in _CARRIED_META}
        self.padded[node] = copied

    def _emit_packed(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            self.packed[node] = self._call(operator.getitem, (self.packed[node.args[0]], node.args[1]))  # type: ignore[index]
        else:
            form = packed_form(node)
            assert form is not None
            args, kwargs = (
                self._map(value, form)
                for value in (
                    node.args if form.args is None else form.args,
                    node.kwargs if form.kwargs is None else form.kwargs,
                )
            )
            self.packed[node] = self._call(form.target or node.target, args, kwargs)
            if form.scale_by_padded_numel is not None:
                self.packed[node] = self._divided_by_numel(self.packed[node], form.scale_by_padded_numel)
        if reads_as_is(node):
            self.padded[node] = self.packed[node]

    def _map(self, value: Any, form: PackedForm) -> Any:
        if isinstance(value, fx.Node):
            return self._operand(value, form.operands[value]) if value in form.operands else self._padded(value)
        if value is Placeholder.TOKENS:
            return self.tokens
        if value is Placeholder.CU_SEQLENS:
            return self.cu_seqlens
        if isinstance(value, (list, tuple)):
            return type(value)(self._map(v, form) for v in value)
        if isinstance(value, dict):
            return {k: self._map(v, form) for k, v in value.items()}
        return value

    def _padded(self, node: fx.Node) -> fx.Node:
        """The padded form of a value, scattered from the packed one where no other exists."""
        if node not in self.padded:
            self.padded[node] = self._scatter(self.packed[node], node.meta["layout"], value_of(node).shape)
        return self.padded[node]

    def _operand(self, node: fx.Node, wanted: Layout) -> fx.Node:
        """The packed form of a value, gathered from the padded one where no op computes it."""
        if is_computed_packed(node, wanted):
            return self.packed[node]
        key = (node, wanted, self.region)
        if key not in self.gathered:
            gathered = self._gather(self._padded(node), wanted, value_of(node).shape)
            for name in _RECOMPUTE_META:
                gathered.meta.pop(name, None)
            self.gathered[key] = gathered
        return self.gathered[key]

    def _gather(self, value: fx.Node, layout: Layout, shape: Any) -> fx.Node:
        spans = {kind for kind, size in zip(layout, shape, strict=True) if not same_size(size, 1)} - {OTHER}
        if TOKENS in layout:
            return self._call(aten.index_select.default, (value, layout.index(TOKENS), self.index))
        if spans == {SEQ}:
            return self._call(aten.index_select.default, (value, layout.index(SEQ), self._index("positions")))
        if spans == {BATCH}:
            rows = self._call(aten.index_select.default, (value, layout.index(BATCH), self._index("rows")))
            return self._call(aten.transpose.int, (rows, layout.index(BATCH), layout.index(SEQ)))
        order = _front(layout)
        front = value if order is None else self._call(aten.permute.default, (value, order))
        packed = self._call(torch.ops.packc.pack.default, (front, self.index))
        return packed if order is None else self._call(aten.permute.default, (packed, _inverse(order)))

    def _index(self, name: str) -> fx.Node:
        """Row or position of every token."""
        if name not in self.indices:
            args = (self.index, self.length)
            if name == "rows":
                node = self._call(aten.div.Scalar_mode, args, {"rounding_mode": "floor"})
            else:
                node = self._call(aten.remainder.Scalar, args)
            self.indices[name] = node
        return self.indices[name]

    def _scatter(self, value: fx.Node, layout: Layout, shape: Any) -> fx.Node:
        if TOKENS in layout:
            axis = layout.index(TOKENS)
            order = None if axis == 0 else [axis, *(d for d in range(len(layout)) if d != axis)]
            front = value if order is None else self._call(aten.permute.default, (value, order))
            rows = self._call(aten.unsqueeze.default, (front, 0))
            padded = self._call(torch.ops.packc.unpack.default, (rows, self.index, self.batch, self.length))
            flat = self._call(aten.flatten.using_ints, (padded, 0, 1))
            return flat if order is None else self._call(aten.permute.default, (flat, _inverse(order)))
        order = _front(layout)
        front = value if order is None else self._call(aten.permute.default, (value, order))
        padded = self._call(torch.ops.packc.unpack.default, (front, self.index, self.batch, self.length))
        return padded if order is None else self._call(aten.permute.default, (padded, _inverse(order)))

    def _as_output(self, node: fx.Node) -> fx.Node:
        """Size, dtype and strides of the padded graph's output."""
        result = self._padded(node)
        if result.target is aten.permute.default and value_of(node).is_contiguous():
            return self._call(aten.contiguous.default, (result,))
        return result

    def _padded_size(self, node: fx.Node, axis: int) -> Any:
        kind = node.meta["layout"][axis]
        if kind is BATCH:
            return self.batch
        if kind is SEQ:
            return self.length
        return self._call(aten.sym_size.int, (self.packed[node], axis))

    def _divided_by_numel(self, total: fx.Node, of: fx.Node) -> fx.Node:
        numel: Any = 1
        layout, shape = of.meta["layout"], value_of(of).shape
        for kind, size in zip(layout, shape, strict=True):
            if kind in (BATCH, TOKENS):
                numel = self._times(numel, self.batch)
            if kind in (SEQ, TOKENS):
                numel = self._times(numel, self.length)
            if kind is OTHER:
                if not isinstance(size, int):
                    raise NotPackable(f"takes the mean of {of.name} over features of symbolic size {size}")
                numel = self._times(numel, size)
        return self._call(aten.div.Scalar, (total, numel))

    def _times(self, a: Any, b: Any) -> Any:
        return self._call(operator.mul, (a, b)) if isinstance(a, fx.Node) or isinstance(b, fx.Node) else a * b


# A checkpointed node is recomputed; what is gathered in the middle of one serves others too and is kept.
_RECOMPUTE_META = ("recompute", "ac_graph_id")
# What Inductor and people read from a node; its values and Dynamo's own notes do not survive the rewrite.
_CARRIED_META = ("nn_module_stack", "stack_trace", "source_fn_stack", "custom", *_RECOMPUTE_META)


def _front(layout: Layout) -> list[int] | None:
    """The permutation that brings (B, L) to the front; None if they are there."""
    first = [layout.index(BATCH), layout.index(SEQ)]
    return None if first == [0, 1] else first + [axis for axis in range(len(layout)) if axis not in first]


def _inverse(order: list[int]) -> list[int]:
    return [order.index(axis) for axis in range(len(order))]
