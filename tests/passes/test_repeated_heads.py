"""Packed attention gets keys and values whose heads were repeated for groups of queries as they were before."""

import pytest
import torch
from harness import RIGHT, RecordingBackend, masks
from torch.nn import functional as F

import packc

B, L, HEADS, D = 3, 8, 4, 4
TAPS = torch.randn(HEADS * D, 3, generator=torch.Generator().manual_seed(1))
REPEATING = {torch.ops.aten.expand.default, torch.ops.aten.repeat_interleave.self_int}


def expanded(x):
    return x[:, :, None].expand(B, 2, 2, L, D).reshape(B, HEADS, L, D)


def interleaved(x):
    return x.repeat_interleave(2, dim=1).contiguous()


def in_turn(x):  # 0 1 0 1, where groups are of 0 0 1 1
    return x[:, None].expand(B, 2, 2, L, D).reshape(B, HEADS, L, D)


def of_fewer(x):  # one head for all four
    return x[:, :1, None].expand(B, 1, 4, L, D).reshape(B, HEADS, L, D)


LEFT_OUT = {"expanded": (expanded, expanded), "interleaved": (interleaved, expanded)}
STAYING = {"in turn": (in_turn, in_turn), "keys alone": (expanded, in_turn), "other groups": (expanded, of_fewer)}


@pytest.mark.parametrize(("of_keys", "of_values"), [*LEFT_OUT.values(), *STAYING.values()], ids=[*LEFT_OUT, *STAYING])
def test_heads_repeated_for_groups(of_keys, of_values):
    backend = RecordingBackend()

    def model(x, attention_mask):
        x = packc.ops.causal_conv1d(x * attention_mask[..., None], TAPS)
        wide = x.unflatten(-1, (HEADS, D)).transpose(1, 2)
        k, v = of_keys(wide[:, :2].cos()), of_values(wide[:, 2:].sin())
        mask = torch.ones(L, L, dtype=torch.bool).tril() & (attention_mask[:, None, None] != 0)
        return F.scaled_dot_product_attention(wide, k, v, mask).transpose(1, 2).flatten(2)

    x, mask = torch.randn(B, L, HEADS * D), masks(RIGHT)
    actual, expected = (step(each, x, mask) for each in (torch.compile(model, backend=backend), model))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert backend.op_count(torch.ops.packc.varlen_attention.default) == 1
    repeating = sum(map(backend.op_count, REPEATING))
    assert repeating == (0 if (of_keys, of_values) in LEFT_OUT.values() else 2)


def step(function, x, mask):
    leaf, real = x.clone().requires_grad_(), mask.bool()
    out = function(leaf, mask)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (grad,) = torch.autograd.grad((out * weight)[real].sum(), leaf)
    return out[real], grad
