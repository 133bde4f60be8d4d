"""Biases of each query by how far back a key is pack wherever models add them; what only looks like them does not."""

import pytest
import torch
from harness import BOTH, LEFT, RIGHT, RecordingBackend, masks
from torch import nn

import packc

B, L, H, D, R = 3, 8, 2, 4, 3
PACKED = torch.ops.packc.varlen_attention.default
DEBUG = {"packc.inner": "aot_eager", "packc.strict": True}
LOW = torch.finfo(torch.float32).min


def slow(name):
    return pytest.param(name, marks=pytest.mark.slow)


def distances(x):
    places = torch.arange(x.shape[2])
    return places[:, None] - places


def by_distance(r, reach=R):
    """``(B, H, L, R)`` to ``(B, H, L, L)``, as models write it."""
    back = distances(r)
    added = r.gather(-1, back.clamp(0, reach - 1).expand(*r.shape[:2], -1, -1))
    return added.masked_fill((back < 0) | (back >= reach), 0)


def backwards(r):
    back = distances(r)
    added = r.gather(-1, (R - 1 - back.clamp(0, R - 1)).expand(*r.shape[:2], -1, -1))
    return added.masked_fill((back < 0) | (back >= R), 0)


def scores(q):
    return q @ q.cos().transpose(2, 3) * D**-0.5


def fused(q, mask):
    return nn.functional.scaled_dot_product_attention(q, q.cos(), q, mask)


def with_sinks(scores):
    sinks = torch.tensor([0.5, -1.0]).view(1, H, 1, 1).expand(scores.shape[0], -1, scores.shape[2], -1)
    return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]


PACKS = {
    "beside the mask": lambda q, r, mask: (scores(q) + by_distance(r) + mask).softmax(-1) @ q,
    "on capped scores, with sinks": lambda q, r, mask: with_sinks(scores(q).tanh() + by_distance(r) + mask) @ q,
    "in the mask": lambda q, r, mask: fused(q, torch.where(mask == 0, by_distance(r), LOW)),
    "in the mask of a window": (
        lambda q, r, mask: fused(q, torch.where((mask == 0) & (distances(q) < 3), by_distance(r), LOW))
    ),
    "on the mask": lambda q, r, mask: fused(q, by_distance(r) + mask),
}
PADDED = {
    "of fewer keys than there are": lambda q, r, mask: (scores(q) + by_distance(r, R - 1) + mask).softmax(-1) @ q,
    "the other way round": lambda q, r, mask: (scores(q) + backwards(r) + mask).softmax(-1) @ q,
    "several times": lambda q, r, mask: (torch.add(scores(q), by_distance(r), alpha=3) + mask).softmax(-1) @ q,
    "in a mask, of which large ones are cut": lambda q, r, mask: fused(q, by_distance(r).clamp(max=9) + mask),
    "twice": lambda q, r, mask: (scores(q) + by_distance(r) + by_distance(r) + mask).softmax(-1) @ q,
    "that are capped": lambda q, r, mask: ((scores(q) + by_distance(r)).tanh() + mask).softmax(-1) @ q,
    "in the mask, twice as much": lambda q, r, mask: fused(q, 2 * by_distance(r) + mask),
    "in the mask, and behind": lambda q, r, mask: fused(q, by_distance(r) + mask + (distances(q) == 3)),
}


class Model(nn.Module):
    def __init__(self, attend):
        super().__init__()
        torch.manual_seed(0)
        self.attend = attend
        self.taps = nn.Parameter(torch.randn(H * D, 3))
        self.heads, self.biases = nn.Linear(H * D, H * D), nn.Linear(H * D, H * R)

    def forward(self, x, attention_mask):
        places = torch.arange(x.shape[1])
        visible = (places <= places[:, None]) & (attention_mask[:, None, None] != 0)
        mask = torch.zeros(visible.shape).masked_fill(~visible, LOW)
        mixed = packc.ops.causal_conv1d(x * attention_mask[..., None], self.taps, activation="silu")
        q = self.heads(mixed).unflatten(-1, (H, D)).transpose(1, 2)
        r = self.biases(mixed).unflatten(-1, (H, R)).transpose(1, 2)
        return torch.tanh(self.attend(q, r, mask).transpose(1, 2).flatten(2))


def step(call, model, x, mask):
    leaf, real = x.clone().requires_grad_(), mask.bool()
    out = call(leaf, mask)[real]
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    return out.detach(), *torch.autograd.grad((out * weight).sum(), [leaf, *model.parameters()])


def assert_is_stock(model, call):
    for rows in (RIGHT, LEFT, BOTH):
        x, mask = torch.randn(B, L, H * D), masks(rows)
        torch.testing.assert_close(step(call, model, x, mask), step(model, model, x, mask), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", [each if each in ("on capped scores, with sinks", "in the mask") else slow(each) for each in PACKS]
)
def test_they_pack(name):
    model, backend = Model(PACKS[name]), RecordingBackend()
    assert_is_stock(model, torch.compile(model, backend=backend))
    assert not backend.reasons
    assert backend.op_count(PACKED) == 1
    assert backend.op_count(torch.ops.aten.gather.default) == 0
    assert not packc.explain(model)(torch.randn(B, L, H * D), masks(RIGHT)).boundaries


def test_at_other_lengths_too():
    model = Model(PACKS["in the mask"])
    call = torch.compile(model, backend="packc", options=DEBUG, dynamic=True)
    for length in (8, 5, 13):
        x, mask = torch.randn(B, length, H * D), torch.ones(B, length, dtype=torch.int64)
        mask[0, 3:] = 0
        torch.testing.assert_close(step(call, model, x, mask), step(model, model, x, mask), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", [each if each in ("the other way round", "in the mask, twice as much") else slow(each) for each in PADDED]
)
def test_others_run_padded(name):
    model, backend = Model(PADDED[name]), RecordingBackend()
    assert_is_stock(model, torch.compile(model, backend=backend))
    assert not backend.reasons
    assert backend.op_count(PACKED) == 0
    assert packc.explain(model)(torch.randn(B, L, H * D), masks(RIGHT)).boundaries


@pytest.mark.parametrize("name", ["on capped scores, with sinks", "in the mask"])
def test_documents_of_a_row_are_kept_apart(name):
    model = Model(PACKS[name])
    call = torch.compile(model, backend="packc", options=DEBUG)
    x, mask = torch.randn(1, L, H * D), torch.ones(1, L, dtype=torch.int64)
    with torch.no_grad(), packc.documents(cu_seqlens=torch.tensor([0, 3, L])):
        out = call(x, mask)
        changed = x.clone()
        changed[:, :3] = torch.nan
        of_others = call(changed, mask)
    with torch.no_grad():
        alone = [model(x[:, a:b], mask[:, a:b]) for a, b in ((0, 3), (3, L))]
    torch.testing.assert_close(out, torch.cat(alone, 1))
    assert torch.equal(of_others[:, 3:], out[:, 3:])
    assert of_others[:, :3].isnan().all()
