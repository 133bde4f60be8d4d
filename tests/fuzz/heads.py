"""Losses, and what is read of the last token or the next one."""

from __future__ import annotations

import torch

from fuzz.program import Axis, Value, features
from fuzz.writer import BATCH_SEQ, Writer

CLASSES = 5


def _labels(w: Writer) -> str:
    if not any(each.kind == "labels" for each in w.inputs):
        w.input("labels", BATCH_SEQ, "labels", bound=CLASSES, dtype=torch.int64)
    return "labels"


def _logits(w: Writer) -> Value | None:
    value = w.tokens()
    if value is None:
        return None
    weight = w.parameter(CLASSES, w.size(value, 2))
    return w.add(f"F.linear({value.name}, {weight})", (*value.axes[:2], features(CLASSES)), value)


def loss(w: Writer) -> Value | None:
    logits = _logits(w)
    if logits is None:
        return None
    x, y = logits.name, _labels(w)
    mask = w.mask_for(logits)
    continued = f"{x}[..., :-1, :].contiguous().view(-1, {CLASSES}), {y}[..., 1:].contiguous().view(-1)"
    token = f"F.cross_entropy({x}.transpose(1, 2), {y}, reduction='none')"
    shifted = (
        f"F.cross_entropy({x}[:, :-1].reshape(-1, {CLASSES}), {y}[:, 1:].reshape(-1), reduction='none').view(B, L - 1)"
    )
    chosen = f"{x}[:, :-1].log_softmax(-1).gather(-1, {y}[:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)"
    k = w.random.randint(2, max(2, w.sizes[1] - 1))
    ahead = f"F.linear({x}[:, :-{k}], {w.parameter(CLASSES, CLASSES)})"
    text = w.choose(
        f"F.cross_entropy({x}.view(-1, {CLASSES}), {y}.view(-1))",
        f"F.cross_entropy({x}.reshape(B * L, {CLASSES}), {y}.flatten(), reduction='sum') / 9",
        f"F.cross_entropy({x}[:, :-1].reshape(-1, {CLASSES}), {y}[:, 1:].reshape(-1))",
        f"F.cross_entropy({continued}, ignore_index=-100)",
        f"F.cross_entropy({x}[:, :-{k}].reshape(-1, {CLASSES}), {y}[:, {k}:].reshape(-1))",
        f"F.cross_entropy({x}[:, :L - {k}].transpose(1, 2), {y}[:, {k}:], reduction='sum') / 9",
        f"F.cross_entropy({x}[:, -{k}:].reshape(-1, {CLASSES}), {y}[:, -{k}:].reshape(-1), reduction='sum')",
        f"F.cross_entropy({ahead}.reshape(-1, {CLASSES}), {y}[:, {k}:].reshape(-1))",
        f"sum(F.cross_entropy({x}[:, :-n].reshape(-1, {CLASSES}), {y}[:, n:].reshape(-1)) for n in range(1, {k}))",
        f"F.cross_entropy({x}[:, :-1].transpose(1, 2), {y}[:, 1:])",
        f"F.nll_loss({x}[:, :-1].log_softmax(1).reshape(-1, {CLASSES}), {y}[:, 1:].reshape(-1))",
        f"F.nll_loss({x}[:, 1:].log_softmax(-1).flatten(0, 1), {y}[:, :-1].flatten())",
        f"F.cross_entropy({x}.permute(1, 2, 0), {y}.T)",
        f"F.cross_entropy({x}.transpose(0, 1)[:-1].reshape(-1, {CLASSES}), {y}.T[1:].reshape(-1))",
        f"F.cross_entropy({x}.view(-1, {CLASSES}), F.pad({y}, (0, 1), value=-100)[:, 1:].reshape(-1))",
        f"F.cross_entropy({x}.view(-1, {CLASSES}), {y}.view(-1), label_smoothing=0.1)",
        f"F.cross_entropy({x}.transpose(1, 2), {y}, weight={w.parameter(CLASSES)}.abs() + 1)",
        f"({token} * {mask}).sum() / {mask}.sum()",
        f"({token} * ({y} != -100)).sum() / ({y} != -100).sum().clamp(min=1)",
        f"({shifted} * {mask}[:, 1:]).sum() / {mask}[:, 1:].sum().clamp(min=1)",
        f"({chosen} * {mask}[:, 1:]).sum()",
        f"F.nll_loss({x}.log_softmax(-1).view(-1, {CLASSES}), {y}.view(-1))",
        f"F.cross_entropy({x}.view(-1, {CLASSES}), {y}.masked_fill({mask} == 0, -100).view(-1))",
        f"(({x} * {mask}[..., None]).square()).mean()",
        f"F.mse_loss({x} * {mask}[..., None], torch.zeros_like({x}))",
        f"torch.where({mask}.bool(), {token}, 0.0).sum()",
    )
    return w.add(text if w.chance(0.95) else f"{token}.mean()", (), logits, keep=False)


def row_scores(w: Writer) -> Value | None:
    """A number or a vector a row."""
    logits = _logits(w)
    if logits is None:
        return None
    x, y, mask = logits.name, _labels(w), w.mask_for(logits)
    last = w.choose(
        f"{mask}.long().sum(1) - 1",
        f"({mask}.long() * torch.arange(L)).argmax(1)",
        f"({mask}.long().sum(-1) - 1).clamp(min=0)",
    )
    chosen = f"{x}[:, :-1].log_softmax(-1).gather(-1, {y}[:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)"
    every = f"{x}.log_softmax(-1).gather(-1, {y}.clamp(min=0)[..., None])[..., 0]"
    vector, number = (Axis(".", "B"), features(CLASSES)), (Axis(".", "B"),)
    text, axes = w.choose(
        (f"{x}[torch.arange(B), {last}]", vector),
        (f"{x}.gather(1, ({last}).clamp(min=0)[:, None, None].expand(-1, 1, {CLASSES})).squeeze(1)", vector),
        (f"({x} * F.one_hot(({last}).clamp(min=0), L)[..., None]).sum(1)", vector),
        (f"torch.einsum('bld,bl->bd', {x}, F.one_hot(({last}).clamp(min=0), L).double())", vector),
        (f"{x}[:, -1]", vector),
        (f"{x}[:, 0]", vector),
        (f"{x}[:, -1:, :].squeeze(1)", vector),
        (f"({chosen} * {mask}[:, 1:]).sum(-1)", number),
        (f"({every} * {mask}).sum(-1)", number),
        (f"({every} * {mask}).sum(1) / {mask}.sum(1).clamp(min=1)", number),
        (f"{chosen}.masked_fill({mask}[:, 1:] == 0, 0).sum(-1)", number),
        (f"torch.logsumexp({x}, -1).mul({mask}).sum(1)", number),
    )
    return w.add(text, axes, logits, keep=False)
