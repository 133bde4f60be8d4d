"""C++ and plain torch tell the same of every batch, and make the same index of it."""

import dataclasses
import random

import pytest
import torch

import packc
from packc.batches import pack_batches
from packc.boundaries import Given
from packc.facts import Labelled, Rows, facts_of
from packc.ops import cpu_library

try:
    cpu_library.find_compiler()
except cpu_library.BuildError as error:
    pytest.skip(str(error), allow_module_level=True)


def drawn(seed: int) -> Rows:
    """Rows with padding anywhere, holes, odd values and live labels; other masks; boundaries that fit or do not."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    B, L = draw.randint(1, 4), draw.randint(1, 9)
    mask = (torch.rand(B, L) < draw.choice([0.1, 0.7, 0.9])).long()
    if draw.random() < 0.7:  # no holes
        mask = mask.cummax(1).values if draw.random() < 0.5 else mask.flip(1).cummax(1).values.flip(1)
    mask = mask * torch.randint(1, 2 + (draw.random() < 0.1), mask.shape)
    mask = mask.to(draw.choice([torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16]))
    if draw.random() < 0.3:
        mask = mask.t().contiguous().t()
    return Rows(
        mask,
        [labels(mask, draw) for _ in range(draw.randint(0, 2))],
        inside=[near(mask, draw) for _ in range(draw.randint(0, 1))],
        outside=draw.choice([None, "outside"]),
        boundaries=[given(B, L, draw) for _ in range(draw.choice([0, 1, 1, 2, 3]))],
        moved=[labels(mask, draw) for _ in range(draw.randint(0, 1))],
        one_before=draw.random() < 0.2,
        padding_attends=draw.random() < 0.2,
        keep_left=draw.choice([None, None, "left"]),
        keep_right=draw.choice([None, None, "right"]),
        least=draw.choice([2, 4]),
    )


def labels(mask, draw):
    counting = torch.rand(mask.shape) < draw.choice([0.1, 0.5])
    counting = counting if draw.random() < 0.3 else counting & (mask != 0)
    ahead = draw.choice([0, 0, 1, 2]) if mask.shape[1] > 2 else 0
    if draw.random() < 0.3:
        return Labelled(counting, 0, ahead)
    values = torch.where(counting, 5, -100).to(draw.choice([torch.int32, torch.int64, torch.float32]))
    return Labelled(values if draw.random() < 0.5 else values.flatten(), -100, ahead)


def near(mask, draw):
    other = (mask != 0) & (torch.rand(mask.shape) < 0.9)
    other[0, 0] |= draw.random() < 0.3
    return other if draw.random() < 0.5 else other[..., None].float()


def given(B, L, draw):
    around = draw.random() < 0.3
    name = draw.choice(["position_ids", "seq_idx", "cu_seqlens"])
    if name == "cu_seqlens":
        inside = sorted(draw.choices(range(B * L + 1), k=draw.randint(0, 4)))
        values = torch.tensor([draw.choice([0, 0, 0, 1]), *inside, B * L])
        return Given(name, values.to(draw.choice([torch.int32, torch.int64])), around)
    rows = draw.choice([1, B])
    lengths = [draw.randint(1, L) for _ in range(L)]
    documents = torch.cat([torch.arange(length) for length in lengths])
    numbers = torch.arange(L).repeat_interleave(torch.tensor(lengths))
    values = (documents if name == "position_ids" else numbers)[:L].expand(rows, L)
    if name == "position_ids" and not around and draw.random() < 0.3:
        values = draw.choice([values * 2, values.expand(3, rows, L), values[:, :1]])
    return Given(name, values, around)


def told(rows, kernels):
    with packc.config.patch(kernels=kernels):
        try:
            (facts,), (packing,) = facts_of([rows]), pack_batches([rows])
        except ValueError as error:
            return str(error)
    assert facts.in_cpp == (kernels == "cpu")
    facts = {**vars(facts), "begins": facts.begins.tolist(), "in_cpp": None}
    tensors = {name: getattr(packing, name) for name in ("index", "cu_seqlens", "offsets")}
    return (
        facts,
        dataclasses.replace(packing, **dict.fromkeys(tensors)),
        {name: (value.dtype, value.tolist()) for name, value in tensors.items()},
    )


def test_cpp_and_torch_pack_every_batch_alike():
    for seed in range(400):
        rows = drawn(seed)
        assert told(rows, "cpu") == told(rows, "reference"), f"seed {seed}: {rows}"


def test_what_cpp_does_not_know_is_told_by_torch():
    mask = torch.ones(2, 3, dtype=torch.complex64)
    assert not facts_of([Rows(mask)])[0].in_cpp
    assert not facts_of([Rows(torch.ones(2, 0))])[0].in_cpp
