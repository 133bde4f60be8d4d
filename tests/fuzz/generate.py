"""A random model from a seed."""

from __future__ import annotations

import random

import torch

from fuzz import along, heads, indexing, mixers, pointwise, products, views
from fuzz.program import Program, features
from fuzz.writer import BATCH_SEQ, Writer

TOKENWISE = {
    pointwise.unary: 8,
    pointwise.binary: 8,
    pointwise.ternary: 2,
    pointwise.masked: 3,
    pointwise.with_a_table: 4,
    pointwise.without_gradient: 0.5,
    views.permuted: 4,
    views.regrouped: 5,
    views.squeezed: 1.5,
    views.expanded: 2,
    views.repeated: 1,
    views.parted: 4,
    views.joined: 3,
    views.written_in_place: 2,
    views.flattened: 2,
    views.unflattened: 3,
    products.linear: 5,
    products.of_tokens: 2,
    products.of_features: 6,
    products.of_other_axes: 2,
    indexing.features_taken: 2,
    indexing.table: 1.5,
    products.lookup: 1,
    products.numbers: 1,
}
MIXERS = {
    mixers.convolution: 3,
    mixers.scan: 1,
    mixers.selective: 1,
    mixers.ssd: 1,
    mixers.linear_attention: 1.5,
    mixers.attention: 3,
    mixers.cross_attention: 1.5,
}
ALONG = {
    along.shifted: 2,
    along.mixed_in: 3,
    along.masked_pool: 3,
    along.pooled: 1.5,
    along.cut: 1.5,
    along.joined_rows: 0.5,
    along.back_to_tokens: 2,
    indexing.picked: 1.5,
}


def generate(seed: int) -> Program:
    draw = random.Random(f"sizes {seed}")
    rows, length = draw.choice((1, 2, 2, 3, 3, 4)), draw.choice((2, 3, 4, 4, 5, 6, 8))
    if draw.random() < 0.15:
        length = max(rows, 2)
    symbolic = draw.choice(("", "", "", "", "", "", "B", "L", "BL", "BL"))
    if rows == 1:
        symbolic = symbolic.replace("B", "")
    width = draw.choice((2, 4, 4, 6, 8, 3, 1, rows, length, length, rows * length if rows * length < 13 else 4))
    w = Writer(seed, (rows, length), width, symbolic)
    _inputs(w)
    wild = draw.choice((0, 0, 0, 0.04, 0.08, 0.15))
    mixed = draw.random() < 0.9
    for number in range(draw.randint(4, 22)):
        if number == 2 and mixed:
            mixers.convolution(w)
        kinds = ALONG if w.chance(wild) else MIXERS if w.chance(0.25) else TOKENWISE
        statement = w.random.choices(list(kinds), list(kinds.values()))[0]
        statement(w)
    outputs = [value for _ in range(w.choose(1, 2, 2, 3)) if (value := w.pick()) is not None]
    for head, probability in ((heads.loss, 0.35), (heads.row_scores, 0.2)):
        made = head(w) if w.chance(probability) else None
        if made is not None:
            outputs.append(made)
    return w.program(dict.fromkeys(outputs))


def _inputs(w: Writer) -> None:
    of_mask = w.choose(torch.int64, torch.int64, torch.bool, torch.float64)
    first = w.choose("ids", "values", "values")
    if first == "ids":
        ids = w.input("input_ids", BATCH_SEQ, "ids", bound=12, dtype=torch.int64)
        w.masked[ids.name] = w.mask
    else:
        x = w.input("x", (*BATCH_SEQ, features(w.width)), "values")
        w.masked[x.name] = w.mask
    w.input(w.mask, BATCH_SEQ, "mask", dtype=of_mask)
    if first == "ids":
        w.add(f"F.embedding(input_ids, {w.parameter(12, w.width)})", (*BATCH_SEQ, features(w.width)), w.values[0])
    if w.chance(0.15):
        w.input("y", (*BATCH_SEQ, features(w.width)), "values")
    if w.chance(0.15):
        other = w.input("z", (*BATCH_SEQ, features(w.width)), "values")
        w.masked[other.name] = w.choose("ref_mask", "ref_attention_mask", "ref_attention_mask", "mask")
        w.input(w.masked[other.name], BATCH_SEQ, "mask", dtype=of_mask)
