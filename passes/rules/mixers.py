"""Mixers: the ops that look along the sequence, and are told where documents begin; by their declarations."""

from __future__ import annotations

import torch
from torch import fx

import packc.ops  # noqa: F401  (declares them)
from packc.ops.mixer import MIXERS, Mixer
from packc.passes.asks import KeepLeft, KeepRight, OneDocument
from packc.passes.axes import BATCH, OTHER, SEQ, Kind, Layout, Whole, same_size, show, value_of
from packc.passes.graph import is_item
from packc.passes.reading import NotTokenwise, Reading
from packc.passes.rules.registry import Op, register_rule
from packc.passes.rules.row_ends import kept_end_of


def _read(op: Op, mixer: Mixer) -> Reading:
    """A causal op over (B, L, ...) with states of documents.

    Right padding comes after every token it could disturb. Left padding comes before: the padded op reads it, and
    gives what the packed one gives only if it adds nothing to the state.
    """
    if op.argument("cu_seqlens") is not None:
        raise NotTokenwise("is already packed")
    arguments = {name: op.argument(name) for name in mixer.per_token}
    needs = {value: _layout(op, name, value) for name, value in arguments.items() if value is not None}
    op.only_labelled(*needs)
    out, *others = value_of(op.node)
    kinds: list[Kind] = [Whole.PER_DOCUMENT, Whole.SAVED]
    results = [(BATCH, SEQ) + (OTHER,) * (out.ndim - 2), *kinds[: len(others)]]
    gives_state = op.argument("output_final_state") and _is_read(op.node, 1)
    reading = Reading(results, needs, op.with_args(output_final_state=gives_state), is_mixer=True)
    if op.argument("initial_state") is not None:
        reading.asks.append(KeepLeft(f"{mixer.name} starts from an initial state, which left padding moves on"))
        reading.asks.append(OneDocument(f"{mixer.name} starts from an initial state of each row"))
    else:
        entering = tuple(arguments[name] for name in mixer.enter_state)
        reason = f"{mixer.name} reads left padding: {mixer.enter_state[0]} is not masked"
        reading.asks.append(KeepLeft(reason, unless_zero=entering))
        for value in entering:
            kept = kept_end_of(value, op.layout)
            if kept is not None:
                reading.asks.append(KeepRight(f"{mixer.name} leaves right padding behind, not masked", (kept,)))
        if all(op.argument(name) is None for name in mixer.unless):
            reading.zero_from = tuple(arguments[name] for name in mixer.gives_zero)
    if gives_state:
        reading.asks.append(KeepRight(f"{mixer.name} returns the state after right padding"))
        reading.asks.append(OneDocument(f"{mixer.name} returns the state of each row"))
    return reading


def _is_read(node: fx.Node, result: int) -> bool:
    return any(is_item(user) and user.args[1] == result and user.users for user in node.users)


def _layout(op: Op, name: str, value: object) -> Layout:
    """Of an argument (B, L, ...): a decay may be the same for all tokens, and be made to vary for show."""
    layout = op.layout(value)
    sizes = value_of(value).shape
    if layout is None and same_size(sizes[0], op.batch) and same_size(sizes[1], op.length):
        layout = (BATCH, SEQ) + (OTHER,) * (len(sizes) - 2)
    if layout is None or layout[:2] != (BATCH, SEQ):
        raise NotTokenwise(f"{name} {show(layout)} is not (B, L, ...)")
    return layout


def _register(mixer: Mixer) -> None:
    register_rule(getattr(torch.ops.packc, mixer.name).default)(lambda op: _read(op, mixer))


for _mixer in MIXERS.values():
    _register(_mixer)
