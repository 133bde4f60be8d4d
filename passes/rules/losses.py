"""Losses over tokens: exact on the pack because a token left out carries the label that the loss ignores."""

from __future__ import annotations

import torch

from packc.passes.asks import IgnoredLabels
from packc.passes.axes import BATCH, SEQ, TOKENS, Whole, covers_tokens, show, value_of
from packc.passes.reading import NotTokenwise, Reading
from packc.passes.rules.registry import Op, register_rule

aten = torch.ops.aten

_REDUCTION_NONE = 0  # torch.nn._reduction.get_enum("none")


@register_rule(aten.cross_entropy_loss.default, aten.nll_loss_nd.default, aten.nll_loss.default)
def cross_entropy(op: Op) -> Reading:
    """Logits (tokens, C) or (B, C, L) against class indices (tokens,) or (B, L)."""
    logits, labels = op.args[:2]
    op.only_labelled(logits, labels)
    layout = op.layout(logits)
    if layout is None or value_of(labels).is_floating_point():
        raise NotTokenwise(f"logits {show(layout)} against labels of {value_of(labels).dtype}")
    classes = 1 if len(layout) > 1 else 0
    op.refuse_token_axes([classes], layout)
    of_labels = layout[:classes] + layout[classes + 1 :]
    own = op.layout(labels)
    if not covers_tokens(of_labels) or (covers_tokens(own) and own != of_labels):
        raise NotTokenwise(f"logits {show(layout)} against labels {show(own)}")
    if of_labels not in ((BATCH, SEQ), (TOKENS,)):
        raise NotTokenwise(f"labels {show(of_labels)} are not row by row, as batches are asked about them")
    needs = {logits: layout, labels: of_labels}
    if op.argument("reduction") == _REDUCTION_NONE:
        return Reading(of_labels, needs)
    return Reading(Whole.SUM, needs, asks=[IgnoredLabels(labels, op.argument("ignore_index"))])
