"""Mixers: the ops that look along the sequence, and read document boundaries from ``cu_seqlens`` when packed."""

from __future__ import annotations

import torch

import packc.ops  # noqa: F401  (registers the ops that the rules are about)
from packc.passes.axes import BATCH, OTHER, SEQ, Layout, show
from packc.passes.rules.registry import NotTokenwise, Op, PackedForm, Placeholder, register_rule

_TOKEN_MAJOR = (BATCH, SEQ, OTHER)


def _recurrent_mixer(op: Op, sequences: tuple[str, ...], masked: str, results: list[Layout | None]) -> PackedForm:
    """A causal op over (B, L, ...) with per-document states.

    Right padding comes after every token it could disturb. Left padding comes before: the padded op reads it, and
    gives what the packed one gives only if ``masked``, the value that enters conv window or state, is zero there.
    """
    arguments = dict(zip((a.name for a in op.target._schema.arguments), op.args, strict=True))
    if arguments["cu_seqlens"] is not None:
        raise NotTokenwise("is already packed")
    needs = {}
    for name in sequences:
        operand = arguments[name]
        if operand is None:
            continue
        layout = op.layout(operand)
        if layout is None or layout[:2] != (BATCH, SEQ):
            raise NotTokenwise(f"{name} {show(layout)} is not (B, L, ...)")
        needs[operand] = layout
    op.only_labelled(*needs)
    args, kwargs = op.with_args(cu_seqlens=Placeholder.CU_SEQLENS)
    form = PackedForm(results, needs, args=args, kwargs=kwargs, is_mixer=True)
    name = op.target._schema.name.split("::")[1]
    if arguments["initial_state"] is not None:
        form.keep_left = f"{name} starts from an initial state, which left padding moves on"
    else:
        form.keep_left_unless_zero = (arguments[masked], f"{name} reads left padding: {masked} is not masked")
    if arguments["output_final_state"]:
        form.keep_right = f"{name} returns the state after right padding"
    return form


@register_rule(torch.ops.packc.causal_conv1d.default)
def causal_conv1d(op: Op) -> PackedForm:
    return _recurrent_mixer(op, ("x",), "x", [_TOKEN_MAJOR, None])


@register_rule(torch.ops.packc.selective_scan.default)
def selective_scan(op: Op) -> PackedForm:
    return _recurrent_mixer(op, ("u", "delta", "B", "C", "z"), "u", [_TOKEN_MAJOR, None, None])
