"""Which values are computed padded, which packed, and which in both forms.

Every value has its padded form: the graph as it was. One with a packed form is computed packed whenever that is what
its users can read. Inputs are padded and are gathered where a packed op first meets them; an op without a rule reads
padded operands. What depends on a mixer exists packed only (computing it padded as well would undo the whole point), so
an op without a rule may read it only where that is exact: scattered back, because it is zero at padding anyway.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from packc.passes.axes import covers_tokens, is_made_of_integers, show
from packc.passes.module_names import module_path
from packc.passes.reasons import NotPackable
from packc.passes.rules import PackedForm


@dataclass
class Forms:
    """The forms in which each node is wanted."""

    packed: set[fx.Node] = field(default_factory=set)
    padded: set[fx.Node] = field(default_factory=set)
    packed_only: set[fx.Node] = field(default_factory=set)


def choose_forms(gm: fx.GraphModule, *, zero: set[fx.Node]) -> Forms:
    """Decide, from the outputs backwards, which form of each value is computed.

    Args:
        gm: a graph with layouts.
        zero: values known to be zero at padding.

    Raises:
        NotPackable: an op without a packed form reads, across tokens, values whose padding would differ.
    """
    forms = Forms()
    _refuse_mutation(gm)
    _find_packed_only(gm, forms)
    _check_boundaries(gm, forms, zero)
    _demand(gm, forms)
    random_twice = [n for n in forms.packed & forms.padded if _is_random(n)]
    if random_twice:
        raise NotPackable(f"{random_twice[0].name} draws random numbers and is read both padded and packed")
    return forms


def switches_mode(node: fx.Node) -> bool:
    """Whether a node turns grad mode or autocast on or off for what follows."""
    return node.op == "call_function" and not isinstance(node.target, torch._ops.OpOverload) and node.is_impure()


def _refuse_mutation(gm: fx.GraphModule) -> None:
    for node in gm.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            raise NotPackable(_describe(node, "writes in place, which a value with two forms cannot follow"))


def packed_form(node: fx.Node) -> PackedForm | None:
    return node.meta.get("packed_form")


def _is_item(node: fx.Node) -> bool:
    return node.target is operator.getitem


def _find_packed_only(gm: fx.GraphModule, forms: Forms) -> None:
    for node in gm.graph.nodes:
        form = packed_form(node)
        sources = form.operands if form is not None else node.args[:1] if _is_item(node) else ()
        if (form is not None and form.is_mixer) or any(source in forms.packed_only for source in sources):
            forms.packed_only.add(node)


def reads_as_is(node: fx.Node) -> bool:
    """A result without token axes (a loss, a final state): one value, whichever form computed it."""
    return not covers_tokens(node.meta.get("layout")) and not isinstance(node.meta.get("layout"), list)


def _check_boundaries(gm: fx.GraphModule, forms: Forms, zero: set[fx.Node]) -> None:
    for node in gm.graph.nodes:
        form = packed_form(node)
        for operand in form.zero_at_padding if form is not None else ():
            if operand not in zero:
                raise NotPackable(_describe(node, f"sums {operand.name} over tokens, which is not masked at padding"))
        reason = node.meta.get("unpacked_because")
        if reason is None:
            continue
        scattered = [n for n in node.all_input_nodes if n in forms.packed_only and not reads_as_is(n)]
        for operand in scattered:
            if operand not in zero:
                raise NotPackable(_describe(node, f"{reason}, and {operand.name} is not zero at padding"))


def _describe(node: fx.Node, reason: str) -> str:
    return f"{node.target} in {module_path(node) or 'the model'}: {reason}"


def _demand(gm: fx.GraphModule, forms: Forms) -> None:
    for node in reversed(gm.graph.nodes):
        if node.op == "output":
            for value in node.all_input_nodes:
                _want_as_output(value, forms)
        elif node.op == "placeholder" or (node.op == "call_function" and node.is_impure(impure_random=False)):
            forms.padded.add(node)
        if node in forms.padded:
            _demand_padded(node, forms)
        if node in forms.packed:
            _demand_packed(node, forms)


def _want_as_output(value: fx.Node, forms: Forms) -> None:
    if value not in forms.packed_only and is_made_of_integers(value):
        # A mask or ids: as cheap in stock's own form, which what comes after a graph break may read at padding too.
        forms.padded.add(value)
        return
    has_packed = packed_form(value) is not None or (_is_item(value) and not reads_as_is(value))
    (forms.packed if has_packed else forms.padded).add(value)


def _demand_padded(node: fx.Node, forms: Forms) -> None:
    if node in forms.packed_only or (packed_form(node) is not None and reads_as_is(node)):
        forms.packed.add(node)
        return
    if node.target is torch.ops.aten.sym_size.int and node.args[0] in forms.packed_only:
        # Only its size is asked for, which the pack pass knows without the value.
        return
    forms.padded.update(node.all_input_nodes)


def _demand_packed(node: fx.Node, forms: Forms) -> None:
    if _is_item(node):
        forms.packed.add(node.args[0])  # type: ignore[arg-type]
        return
    form = packed_form(node)
    assert form is not None, f"{node} is wanted packed and has no packed form"
    for operand in _arguments(node, form):
        if operand in form.operands and is_computed_packed(operand, form.operands[operand]):
            forms.packed.add(operand)
        else:
            forms.padded.add(operand)


def _arguments(node: fx.Node, form: PackedForm) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg((_args(node, form), _kwargs(node, form)), found.append)
    return found


def _args(node: fx.Node, form: PackedForm) -> Any:
    return node.args if form.args is None else form.args


def _kwargs(node: fx.Node, form: PackedForm) -> Any:
    return node.kwargs if form.kwargs is None else form.kwargs


def is_computed_packed(operand: fx.Node, wanted: Any) -> bool:
    """Whether the operand's packed form comes from an op; otherwise it is gathered from the padded one."""
    if packed_form(operand) is None:
        source: Any = operand.args[0] if _is_item(operand) else None
        if source is None or not isinstance(source.meta.get("layout"), list):
            return False
    assert operand.meta.get("layout") == wanted, f"{operand} {show(operand.meta.get('layout'))}, wanted {show(wanted)}"
    return True


def _is_random(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
