"""Mixers: the ops that look along the sequence, and are told where documents begin."""

from __future__ import annotations

import torch

import packc.ops  # noqa: F401  (registers the ops that the rules are about)
from packc.passes.asks import KeepLeft, KeepRight
from packc.passes.axes import BATCH, OTHER, SEQ, Kind, Whole, show
from packc.passes.reading import NotTokenwise, Reading
from packc.passes.rules.registry import Op, register_rule

_TOKEN_MAJOR = (BATCH, SEQ, OTHER)


def _recurrent_mixer(op: Op, sequences: tuple[str, ...], masked: str, results: list[Kind]) -> Reading:
    """A causal op over (B, L, ...) with per-document states.

    Right padding comes after every token it could disturb. Left padding comes before: the padded op reads it, and
    gives what the packed one gives only if ``masked``, the value that enters conv window or state, is zero there.
    """
    if op.argument("cu_seqlens") is not None:
        raise NotTokenwise("is already packed")
    needs = {}
    for name in sequences:
        operand = op.argument(name)
        if operand is None:
            continue
        layout = op.layout(operand)
        if layout is None or layout[:2] != (BATCH, SEQ):
            raise NotTokenwise(f"{name} {show(layout)} is not (B, L, ...)")
        needs[operand] = layout
    op.only_labelled(*needs)
    reading = Reading(results, needs, [op.with_args()], is_mixer=True)
    name = op.target._schema.name.split("::")[1]
    if op.argument("initial_state") is not None:
        reading.asks.append(KeepLeft(f"{name} starts from an initial state, which left padding moves on"))
    else:
        reason = f"{name} reads left padding: {masked} is not masked"
        reading.asks.append(KeepLeft(reason, unless_zero=op.argument(masked)))
    if op.argument("output_final_state"):
        reading.asks.append(KeepRight(f"{name} returns the state after right padding"))
    return reading


@register_rule(torch.ops.packc.causal_conv1d.default)
def causal_conv1d(op: Op) -> Reading:
    return _recurrent_mixer(op, ("x",), "x", [_TOKEN_MAJOR, Whole.PER_DOCUMENT])


@register_rule(torch.ops.packc.selective_scan.default)
def selective_scan(op: Op) -> Reading:
    return _recurrent_mixer(op, ("u", "delta", "B", "C", "z"), "u", [_TOKEN_MAJOR, Whole.PER_DOCUMENT, Whole.SAVED])
