"""Losses over tokens: exact on the pack because a token left out carries the label that the loss ignores."""

from __future__ import annotations

import torch

from packc.passes.asks import IgnoredLabels
from packc.passes.axes import BATCH, SEQ, TOKENS, Whole, covers_tokens, show, value_of
from packc.passes.reading import Call, Mean, NotTokenwise, Reading
from packc.passes.rules.registry import Op, register_rule

aten = torch.ops.aten

_REDUCTION_NONE, _REDUCTION_MEAN, _REDUCTION_SUM = range(3)  # as torch.nn._reduction.get_enum has them


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
    reading = Reading(Whole.SUM, needs, asks=[IgnoredLabels(labels, op.argument("ignore_index"))])
    if op.argument("reduction") == _REDUCTION_MEAN:
        reading.mean = Mean(_total(op), _number(op))
    return reading


def _total(op: Op) -> Call:
    """In fp32 at least: a sum is as large as there are tokens."""
    logits, weight = op.args[0], op.argument("weight")
    dtype = torch.promote_types(value_of(logits).dtype, torch.float32)
    total = op.with_args(reduction=_REDUCTION_SUM, weight=weight and Call(aten.to.dtype, (weight, dtype), {}))
    return total._replace(args=(Call(aten.to.dtype, (logits, dtype), {}), *total.args[1:]))


def _number(op: Op) -> Call:
    """Labels that count, each by its class's weight."""
    labels, weight = op.args[1], op.argument("weight")
    live = Call(aten.ne.Scalar, (labels, op.argument("ignore_index")), {})
    if weight is not None:
        classes = Call(aten.mul.Tensor, (labels, live), {})
        live = Call(aten.mul.Tensor, (Call(aten.take.default, (weight, classes), {}), live), {})
    return Call(aten.sum.default, (live,), {"dtype": torch.float64})
