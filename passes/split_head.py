"""Logits that a model returns beside its loss leave the packed graph, and the loss is computed without them.

    logits = linear(hidden, weight)              loss = sum(linear_cross_entropy(hidden, weight, labels))
    loss = cross_entropy(logits, labels)   ->    return loss, hidden
    return loss, unpack(logits)

What makes padded logits of what is returned in their place is a :class:`Tail`: whoever reads them runs it. Of tokens
that are cut over ranks, hidden states are gathered in the place of logits, on all ranks, whoever reads: what is left to
the reader needs no other rank.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

import packc.ops.linear_cross_entropy  # noqa: F401  (the op)
from packc.passes.arguments import argument, arguments_of
from packc.passes.axes import is_tensor, value_of
from packc.passes.graph import switches_mode

aten = torch.ops.aten

_UNPACK = torch.ops.packc.unpack.default
_WIDE = 4
"""Logits are worth it from so many times the hidden size on; narrower ones are no more than a few of the many values
that are kept of each token, and making them twice costs more than they do."""
_VIEWS = {aten.view.default, aten.reshape.default, aten.flatten.using_ints}
_AS_IT_IS = {aten.contiguous.default, aten.clone.default, aten.alias.default}
_FACTORS = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar}
_NONE, _MEAN, _SUM = range(3)  # as torch.nn._reduction.get_enum has them


class Autocast(NamedTuple):
    device: str
    dtype: torch.dtype
    enabled: bool

    @classmethod
    def around(cls, device: str) -> Autocast:
        """The one that is on here."""
        return cls(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))


@dataclass(frozen=True)
class Tail:
    """Logits that are not computed: how they are, when somebody reads them."""

    output: int
    """Where in what the graph returns: packed hidden states ``(1, T, D)`` are there, or ``(1, T_r, D)`` of a rank's own
    tokens, where outputs stay on their ranks; or those of rows, ``(B, D)``."""
    weight: int
    """Which input of the graph is the head's weight ``(V, D)``."""
    bias: int | None
    index: int | None
    """Which one is the index of the pack; None for logits that stay as they are: ``(1, T_r, V)``, or one a row."""
    sizes: tuple[int | tuple[int, int], ...]
    """B and L: numbers, or which axis of which input; none without an index."""
    steps: tuple[tuple[OpOverload, tuple[Any, ...], dict[str, Any]], ...]
    """Ops that follow on the linear layer, each on what the one before it gives and its own further arguments."""
    dtype: torch.dtype
    autocast: Autocast | None = None
    """Under which the linear layer runs; None: under the one around the graph."""

    def rows(self, hidden: Tensor, inputs: Sequence[Any]) -> tuple[int, ...]:
        """The sizes of a batch's logits but the last."""
        if self.index is None:
            return tuple(hidden.shape[:-1])
        return tuple(size if isinstance(size, int) else inputs[size[0]].shape[size[1]] for size in self.sizes)

    def logits(
        self, shape: torch.Size, hidden: Tensor, index: Tensor | None, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """The logits, padded ``(B, L, V)`` if there is an index."""
        result = aten.linear.default(hidden, weight, bias)
        for op, args, kwargs in self.steps:
            result = op(result, *args, **kwargs)
        return result if index is None else _UNPACK(result, index, *shape[:2])


class _Head(NamedTuple):
    """A linear layer whose result a loss reads."""

    linear: fx.Node
    autocast: Autocast | None
    scale: float
    cap: float
    dtype: torch.dtype
    """The loss's."""


def split_head(gm: fx.GraphModule, *, lazily: bool) -> list[Tail]:
    """Rewrite, in place, every loss of such logits in a packed graph.

    Args:
        lazily: logits that are returned too are taken out, as what this function returns.
    """
    modes, tails = _modes(gm.graph), []
    for loss in list(gm.graph.find_nodes(op="call_function", target=aten.cross_entropy_loss.default)):
        head = _head(loss, modes)
        if head is None:
            continue
        made = _made_of(head.linear, loss)
        if made is None or not made <= modes.keys() or loss.args[1] in made:
            continue
        outputs: Any = gm.graph.output_node().args[0]
        returned = [n for n, value in enumerate(outputs) if value in made]
        tail = _tail(gm.graph, returned[0], head) if len(returned) == 1 else None
        if returned and (tail is None or not lazily):
            continue
        _write(gm.graph, loss, head)
        if tail is not None:
            tails.append(tail)
            output = gm.graph.output_node()
            output.replace_input_with(outputs[tail.output], _of_all_ranks(outputs[tail.output], head.linear.args[0]))
        for node in reversed([node for node in gm.graph.nodes if node in made]):
            gm.graph.erase_node(node)
    gm.recompile()
    return tails


def _modes(graph: fx.Graph) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """The autocasts that are entered in the graph and are on around each node; nothing of nodes without gradients."""
    modes, on, grad = {}, list[fx.Node](), True
    for node in graph.nodes:
        if switches_mode(node):
            name = getattr(node.target, "__name__", "")
            if name == "_set_grad_enabled":
                grad = bool(node.args[0])
            elif name == "_enter_autocast":
                on.append(node)
            elif name == "_exit_autocast":
                on = [each for each in on if each is not node.args[0]]
            else:
                break
        elif grad:
            modes[node] = tuple(on)
    return modes


def _autocast(entered: tuple[fx.Node, ...], device: str) -> Autocast | None:
    """The innermost one of a device; None where that is the one around the graph."""
    given = next((node.args for node in reversed(entered) if node.args[0] == device), None)
    if given is None:
        return None
    return Autocast(device, given[1] or torch.get_autocast_dtype(device), bool(given[2]))  # type: ignore[arg-type]


# ---- reading ---------------------------------------------------------------------------------------------------------


def _head(loss: fx.Node, modes: dict[fx.Node, tuple[fx.Node, ...]]) -> _Head | None:
    """The linear layer of a loss of ``(T, V)`` logits, if nothing but scaling, a cap and casts lies between."""
    steps: list[fx.Node] = []
    node: Any = loss.args[0]
    while isinstance(node, fx.Node) and node.op == "call_function" and node.target is not aten.linear.default:
        steps.append(node)
        node = node.args[0] if node.args else None
    if not isinstance(node, fx.Node) or node.target is not aten.linear.default or argument(loss, "weight") is not None:
        return None
    if _may_be_shares(loss.args[1]):
        return None
    weight = node.args[1]
    if not _is_input(weight) or not all(_is_input(bias) for bias in node.args[2:] if bias is not None):
        return None
    if node not in modes or loss not in modes:
        return None
    device = value_of(weight).device.type
    autocast, of_loss = (_autocast(modes[each], device) for each in (node, loss))
    if autocast != of_loss:
        return None
    (V, D), dtype = value_of(weight).shape, value_of(weight).dtype
    if not isinstance(V, int) or not isinstance(D, int) or V < _WIDE * D:
        return None
    factors, flat, wide = [1.0], False, (autocast or Autocast.around(device)).enabled
    for step in reversed(steps):
        if step.target is aten.to.dtype and step.args[1] in (torch.float32, dtype) and len(step.args) == 2:
            wide |= step.args[1] is torch.float32
        elif step.target in _VIEWS:
            flat = _flattens_tokens(step, V)
            if not flat:
                return None
        elif step.target in _FACTORS and isinstance(step.args[1], (int, float)) and not step.kwargs:
            by = float(step.args[1])
            factors[-1] *= by if step.target in (aten.mul.Tensor, aten.mul.Scalar) else 1 / by if by else 0.0
        elif step.target is aten.tanh.default and len(factors) == 1:
            factors.append(1.0)
        elif step.target not in _AS_IT_IS:
            return None
    if not flat or (len(factors) == 2 and factors[1] <= 0):
        return None
    scale, cap = (factors[0], 0.0) if len(factors) == 1 else (factors[0] * factors[1], factors[1])
    return _Head(node, autocast, scale, cap, torch.float32 if wide else dtype)


def _may_be_shares(labels: Any) -> bool:
    """Whether labels may be shares of classes: made of floating numbers, as a packed graph knows its inputs' dtypes."""
    seen, queue = set[fx.Node](), [labels]
    while queue:
        node = queue.pop()
        if node not in seen:
            seen.add(node)
            dtypes = [each for each in (*node.args, *node.kwargs.values()) if isinstance(each, torch.dtype)]
            dtypes += [value_of(node).dtype] if _is_input(node) and is_tensor(node) else []
            if any(each.is_floating_point for each in dtypes):
                return True
            queue.extend(node.all_input_nodes)
    return False


def _flattens_tokens(view: fx.Node, V: int) -> bool:
    if view.target is aten.flatten.using_ints:
        return view.args[1:] in ((0, 1), (0, -2))
    sizes: Any = view.args[1]
    return len(sizes) == 2 and sizes[1] == V


def _made_of(linear: fx.Node, loss: fx.Node) -> set[fx.Node] | None:
    """The logits and all that is made of them but the loss; None if that is more than what is returned."""
    made, queue = {linear}, [linear]
    while queue:
        for user in queue.pop().users:
            if user is loss or user.op == "output" or user in made:
                continue
            if not isinstance(user.target, OpOverload) or not (
                _is_entrywise(user) or _is_unshard(user) or user.target in (_UNPACK, *_VIEWS)
            ):
                return None
            made.add(user)
            queue.append(user)
    return made


def _is_entrywise(node: fx.Node) -> bool:
    """Whether a node has as many entries as its first argument, made of these alone."""
    op: Any = node.target
    if op._schema.is_mutable or torch.Tag.nondeterministic_seeded in op.tags or len(node.all_input_nodes) != 1:
        return False
    return torch.Tag.pointwise in op.tags or op in _AS_IT_IS or op is aten.to.dtype


def _tail(graph: fx.Graph, output: int, head: _Head) -> Tail | None:
    """The logits as they are returned, where they are scattered last."""
    inputs, linear = list(graph.find_nodes(op="placeholder")), head.linear
    outputs: Any = graph.output_node().args[0]
    node: Any = outputs[output]
    index: Any = None
    sizes: list[Any] = []
    if node.target is _UNPACK:
        node, index, *sizes = node.args
        if _is_unshard(node):
            node = node.args[0]
    where = tuple(_where(size, inputs) for size in sizes)
    steps = []
    while node is not linear:
        if not isinstance(node, fx.Node) or not isinstance(node.target, OpOverload) or not _is_entrywise(node):
            return None
        steps.append((node.target, tuple(node.args[1:]), dict(node.kwargs)))
        node = node.args[0]
    if None in where or index not in (None, *inputs):
        return None
    _, weight, bias = arguments_of(linear).values()
    return Tail(
        output=output,
        weight=inputs.index(weight),
        bias=None if bias is None else inputs.index(bias),
        index=None if index is None else inputs.index(index),
        sizes=where,  # type: ignore[arg-type]
        steps=tuple(reversed(steps)),
        dtype=_dtype(value_of(weight), head.autocast, steps),
        autocast=head.autocast,
    )


def _is_unshard(node: fx.Node) -> bool:
    """Whether a node gathers the tokens of all ranks."""
    return isinstance(node.target, OpOverload) and node.target.name() == "packc::unshard"


def _of_all_ranks(logits: fx.Node, hidden: Any) -> Any:
    """Hidden states of the tokens that ``logits`` are of."""
    gather: Any = logits.args[0]
    if not isinstance(gather, fx.Node) or not _is_unshard(gather):
        return hidden
    with gather.graph.inserting_before(gather):
        target: Any = gather.target
        gathered = gather.graph.call_function(target, (hidden, *gather.args[1:]))
    gathered.meta = dict(gather.meta)
    return gathered


def _dtype(weight: Tensor, autocast: Autocast | None, steps: list[Any]) -> torch.dtype:
    """Of logits, after the last of the casts that follow."""
    cast = next((args[0] for op, args, _ in steps if op is aten.to.dtype), None)
    autocast = autocast or Autocast.around(weight.device.type)
    return cast or (autocast.dtype if autocast.enabled else weight.dtype)


def _where(size: Any, inputs: list[fx.Node]) -> int | tuple[int, int] | None:
    if isinstance(size, int):
        return size
    if isinstance(size, fx.Node) and size.target is aten.sym_size.int and size.args[0] in inputs:
        return inputs.index(size.args[0]), size.args[1]  # type: ignore[arg-type, return-value]
    return None


def _is_input(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "placeholder"


# ---- writing ---------------------------------------------------------------------------------------------------------


def _write(graph: fx.Graph, loss: fx.Node, head: _Head) -> None:
    hidden, weight, bias = arguments_of(head.linear).values()
    labels: Any = loss.args[1]
    ignore_index, smoothing = argument(loss, "ignore_index"), argument(loss, "label_smoothing")

    def write(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = graph.call_function(target, args, kwargs)
        node.meta = dict(loss.meta)
        return node

    with graph.inserting_before(loss):
        tokens = write(aten.reshape.default, hidden, [-1, value_of(weight).shape[1]])
        given = (tokens, weight, bias, labels, ignore_index, smoothing, head.scale, head.cap)
        both = write(torch.ops.packc.linear_cross_entropy.default, *given)
        result = write(operator.getitem, both, 0)
        reduction = argument(loss, "reduction")
        if reduction != _NONE:
            result = write(aten.sum.default, result)
        if reduction == _MEAN:
            number = write(aten.sum.default, write(aten.ne.Scalar, labels, ignore_index))
            result = write(aten.div.Tensor, result, number)
        result = write(aten.to.dtype, result, head.dtype)
    loss.replace_all_uses_with(result)
    graph.erase_node(loss)
