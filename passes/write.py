"""Padded graph -> packed graph: inputs gathered once, ops on ``(1, T, ...)``, outputs scattered once."""

from __future__ import annotations

import functools
import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from packc.passes.arguments import argument
from packc.passes.axes import BATCH, FLAT, SEQ, TOKENS, Axis, Layout, Whole, hint_of, is_tensor, value_of
from packc.passes.choose import is_computed_packed, reads_as_is
from packc.passes.forms import Packed, Sharded
from packc.passes.forms import packed as of_packed
from packc.passes.forms import sharded as of_sharded
from packc.passes.graph import Graph, is_item, module_of, switches_mode
from packc.passes.normalize import carry_over_from_dynamo
from packc.passes.outlined import Outlined
from packc.passes.positions import knows_only_positions
from packc.passes.reading import Call, PaddedNumel, Reading
from packc.passes.rules.row_ends import end_taken
from packc.passes.work import work_of

aten = torch.ops.aten


def write(graph: Graph) -> Graph:
    """Write every value in the forms that are wanted; the result has more inputs, the ``Inputs`` of its form.

    Outputs keep size, dtype and the order of their axes in memory; their padded positions are zero. Exact under the
    graph's requirements, which hold batch by batch or not.

    Raises:
        NotPackable: it cannot be cut over ranks.
    """
    if graph.ranks is not None:
        of_sharded.refuse_what_looks_across_ranks(graph)
        if graph.ranks.by_work:
            graph = replace(graph, work=work_of(graph))
    writer = _Writer(graph)
    return replace(graph, gm=writer.run(), local_outputs=writer.local_outputs)


class _Writer:
    """Writes the packed graph in the order of the padded one, each node in the forms that are wanted."""

    def __init__(self, graph: Graph) -> None:
        self.source, self.tokens, self.forms = graph.gm, graph.tokens, graph.forms
        self.graph = fx.Graph()
        self.origin: fx.Node | None = None  # the padded node being written: its metadata goes to all it becomes
        self.in_padded: dict[fx.Node, fx.Node] = {n: self.graph.node_copy(n) for n in graph.placeholders}
        self.in_packed: dict[fx.Node, fx.Node] = {}
        # Keyed by region too: under no_grad a gather has no gradient, so it must not serve the code around.
        self.gathered: dict[tuple[fx.Node, Layout, int], fx.Node] = {}
        self.region = 0
        self.local = graph.ranks is not None and graph.ranks.local_outputs
        self.local_outputs: list[int] = []
        self.packed = self._form(graph)
        self.padded = self.packed.padded

    def _form(self, graph: Graph) -> Packed:
        of = self.in_padded[graph.mask], graph.sizes
        number = f"_{len(graph.streams)}" if graph.streams else ""

        def given(name: str) -> fx.Node:
            return self.graph.placeholder(f"packc_{name}{number}")

        if graph.ranks is None:
            return Packed(self._write, of_packed.Inputs(*map(given, Packed.INPUTS)), *of)
        inputs = of_sharded.Inputs(*map(given, Sharded.INPUTS))
        reaches = {}
        for causal in graph.requirements.attention:
            names = of_sharded.ReachInputs.names("before" if causal else "around", graph.ranks.size)
            reaches[causal] = of_sharded.ReachInputs.of(list(map(given, names)))
        return Sharded(self._write, inputs, reaches, *of, graph.ranks)

    def run(self) -> fx.GraphModule:
        for node in self.source.graph.nodes:
            self.origin = node
            if node.op == "output":
                outputs = fx.map_arg(node.args[0], self._as_output)
                self.local_outputs = [n for n, each in enumerate(node.args[0]) if self._stays_local(each)]
                self.graph.output(outputs)
            elif node.op != "placeholder":
                self.region += switches_mode(node)
                if node in self.forms.padded and node not in self.forms.packed_only:
                    self._write_padded(node)
                if node in self.forms.packed:
                    self._write_packed(node)
                    if node in self.forms.padded:
                        self._padded(node)
        for node in reversed(self.graph.nodes):
            if node.target is aten.unsqueeze.default and not node.users:  # of what was gathered without its axis
                self.graph.erase_node(node)
        self.graph.lint()
        written = module_of(self.source, self.graph)
        carry_over_from_dynamo(self.source, written)
        return written

    def _write(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        if isinstance(target, Outlined):
            return self._write_body(target.body, args)
        node = self.graph.call_function(target, args, kwargs)
        if self.origin is not None:
            node.meta = _carried(self.origin)
        return node

    def _write_body(self, body: fx.Graph, args: tuple[Any, ...]) -> fx.Node:
        written = dict(zip(body.find_nodes(op="placeholder"), args, strict=True))
        for node in body.nodes:
            if node.op == "call_function":
                written[node] = self.graph.node_copy(node, written.__getitem__)
                written[node].meta = _carried(node)
        return written[body.output_node().args[0]]

    def _write_padded(self, node: fx.Node) -> None:
        if node in self.tokens.readings and reads_as_is(node, self.tokens):
            return  # written once, by its packed form
        if node.target is aten.sym_size.int and node.args[0] in self.forms.packed_only:
            self.in_padded[node] = self._padded_size(*node.args)  # type: ignore[arg-type]
            return
        self.in_padded[node] = self._end(node) or self._copy(node)

    def _end(self, node: fx.Node) -> fx.Node | None:
        """The end of rows of a value that has no padded form."""
        size = None if self.packed.is_part else end_taken(node, self.tokens.layout)
        source: Any = node.args[0] if size else None
        if size is None or source not in self.in_packed or source in self.in_padded:
            return None
        layout = self.tokens.layout(source)
        assert layout is not None
        return self.packed.leave_end(self.in_packed[source], layout, size)

    def _copy(self, node: fx.Node) -> fx.Node:
        if isinstance(node.target, Outlined):
            return self._write(node.target, *map(self._padded, node.args))  # type: ignore[arg-type]
        copied = self.graph.node_copy(node, self._padded)
        copied.meta = _carried(node)
        if copied.target in _VIEWS:
            copied.target = aten.reshape.default  # what was scattered, or is cut late, may lie in another way
        return copied

    def _write_packed(self, node: fx.Node) -> None:
        if is_item(node):
            written = self._write(operator.getitem, self.in_packed[node.args[0]], node.args[1])  # type: ignore[index]
        else:
            written = self._write_reading(node, self.tokens.readings[node])
        self.in_packed[node] = written
        if reads_as_is(node, self.tokens):
            self.in_padded[node] = written

    def _write_reading(self, node: fx.Node, reading: Reading) -> fx.Node:
        if reading.padded is not None:
            layout, copied = self.tokens.layout(node), self._copy(node)
            return copied if layout is None else self.packed.enter(copied, layout, value_of(node).shape)
        if reading.mean is not None and self.packed.is_part:
            total, number = (self.packed.total(self._write_call(each, reading)) for each in reading.mean)
            return self._write(aten.to.dtype, self._write(aten.div.Tensor, total, number), value_of(node).dtype)
        call = reading.call or Call(node.target, node.args, dict(node.kwargs))  # type: ignore[arg-type]
        result = self._write_call(call, reading)
        return self.packed.total(result) if reading.results is Whole.SUM else result

    def _write_call(self, call: Call, reading: Reading) -> fx.Node:
        if call.target is operator.getitem and isinstance(call.args[0], Call) and call.args[0].is_mixer:
            mixer = self.packed.mixer(call.args[0])
            if len(mixer.target._schema.returns) == 1:  # type: ignore[attr-defined]
                return self._write_told(mixer, reading)  # its form has no other result
        return self._write_told(self.packed.mixer(call) if call.is_mixer else call, reading)

    def _write_told(self, call: Call, reading: Reading) -> fx.Node:
        target, args, kwargs = call
        args, kwargs = self._map((args, kwargs), reading)
        return self._write(target, *args, **kwargs)

    def _map(self, value: Any, reading: Reading) -> Any:
        if isinstance(value, fx.Node):
            if value.graph is self.graph:
                return value
            return self._operand(value, reading.operands[value]) if value in reading.operands else self._padded(value)
        if isinstance(value, Call):
            return self._write_call(value, reading)
        if isinstance(value, Axis):
            return self.packed.size(value)
        if isinstance(value, PaddedNumel):
            return self._padded_numel(value.value)
        if isinstance(value, (list, tuple)):
            return type(value)(self._map(v, reading) for v in value)
        if isinstance(value, dict):
            return {k: self._map(v, reading) for k, v in value.items()}
        return value

    def _padded(self, node: fx.Node) -> fx.Node:
        """The padded form of a value, scattered from the packed one where no other exists."""
        if node not in self.in_padded:
            layout = self.tokens.layout(node)
            assert layout is not None, f"{node} has no token axes and was not written"
            self.in_padded[node] = self.packed.leave(self.in_packed[node], layout, value_of(node).shape)
        return self.in_padded[node]

    def _operand(self, node: fx.Node, wanted: Layout) -> fx.Node:
        """The packed form of a value, gathered from the padded one where no op computes it."""
        if is_computed_packed(node, self.tokens):
            assert self.tokens.layout(node) == wanted, f"{node} is {self.tokens.layout(node)}, wanted {wanted}"
            return self.in_packed[node]
        key = (node, wanted, self.region)
        if key not in self.gathered:
            gathered = self._unsqueezed(node, wanted) or self._gathered(node, wanted)
            for name in _RECOMPUTE_META:
                gathered.meta.pop(name, None)
            self.gathered[key] = gathered
        return self.gathered[key]

    def _unsqueezed(self, node: fx.Node, wanted: Layout) -> fx.Node | None:
        """Of a value of positions alone with an axis more, as each layer makes one of a rotary table: the axis is added
        to what the other one, gathered once for all layers, has become."""
        if node.target is not aten.unsqueeze.default or of_packed.spans(wanted, value_of(node).shape) != {SEQ}:
            return None
        source: Any = node.args[0]
        at = argument(node, "dim") % len(wanted)
        if wanted[at] is SEQ or is_computed_packed(source, self.tokens):
            return None
        return self._write(aten.unsqueeze.default, self._operand(source, wanted[:at] + wanted[at + 1 :]), at)

    def _gathered(self, node: fx.Node, wanted: Layout) -> fx.Node:
        shape, by_position = value_of(node).shape, knows_only_positions(node)
        return self.packed.enter(self._padded(node), wanted, shape, by_position=by_position)

    def _as_output(self, node: fx.Node) -> fx.Node:
        """Size and dtype of the padded graph's output, and the order of its axes in memory."""
        if self._stays_local(node):
            return self.in_packed[node]
        result = self._padded(node)
        axes = list(range(value_of(node).ndim if is_tensor(node) else 0))
        if self.tokens.layout(node) is None or node not in self.forms.packed:
            return self._laid_out(result, node) if len(axes) > 1 and node.op != "placeholder" else result
        written = _inverse(result.args[1]) if result.target is aten.permute.default else axes  # type: ignore[arg-type]
        wanted = _order_in_memory(value_of(node))
        return result if written == wanted else self._in_order(result, wanted)

    def _laid_out(self, result: fx.Node, node: fx.Node) -> fx.Node:
        """A value that no form changes, of ops that passes before put in the place of the model's: they may have laid
        it out in another way. Nothing is copied if not."""
        value = value_of(node)
        if None in map(hint_of, value.shape):
            return result
        wanted = _order_in_memory(value)
        return self._in_order(result, wanted) if value.permute(wanted).is_contiguous() else result

    def _in_order(self, value: fx.Node, order: list[int]) -> fx.Node:
        """Dense, with axes in this order in memory."""
        if order == sorted(order):
            return self._write(aten.contiguous.default, value)
        dense = self._write(aten.contiguous.default, self._write(aten.permute.default, value, order))
        return self._write(aten.permute.default, dense, _inverse(order))

    def _stays_local(self, value: Any) -> bool:
        return self.local and value in self.in_packed and (self.tokens.layout(value) or ())[:2] == (BATCH, SEQ)

    def _padded_size(self, node: fx.Node, axis: int) -> Any:
        layout, size = self.tokens.layout(node), value_of(node).shape[axis]
        kind = None if layout is None else layout[axis]
        if kind in (BATCH, SEQ):
            return self.padded.size(kind)
        if kind is TOKENS:
            return self._times(self.padded.batch, self.padded.length)
        if isinstance(size, int):
            return size
        return self._write(aten.sym_size.int, self._padded(node) if kind is FLAT else self.in_packed[node], axis)

    def _padded_numel(self, of: fx.Node) -> Any:
        return functools.reduce(self._times, (self._padded_size(of, axis) for axis in range(value_of(of).ndim)), 1)

    def _times(self, a: Any, b: Any) -> Any:
        return self._write(operator.mul, a, b) if isinstance(a, fx.Node) or isinstance(b, fx.Node) else a * b


_VIEWS = {aten.view.default, aten._unsafe_view.default}
# A checkpointed node is recomputed; what is gathered in the middle of one serves others too and is kept.
_RECOMPUTE_META = ("recompute", "ac_graph_id")
# What Inductor and people read from a node; its values and Dynamo's own notes do not survive the rewrite.
_CARRIED_META = ("nn_module_stack", "stack_trace", "source_fn_stack", "custom", *_RECOMPUTE_META)


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _order_in_memory(value: torch.Tensor) -> list[int]:
    """Axes from the outermost to the innermost; as they come, where they have no order of their own."""
    axes, strides = list(range(value.ndim)), list(map(hint_of, value.stride()))
    if value.is_contiguous() or None in strides or 0 in strides:
        return axes
    return sorted(axes, key=lambda axis: -strides[axis])


def _carried(node: fx.Node) -> dict[str, Any]:
    return {name: value for name, value in node.meta.items() if name in _CARRIED_META}
