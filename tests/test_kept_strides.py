"""What is saved for a packed backward has the strides that it was traced with."""

import pytest
import torch
from harness import RIGHT, masks
from torch.nn import functional as F

import packc
from packc import kept_strides

B, L, H, D = 3, 8, 2, 4
STRICT = {"packc.strict": True}
TABLE = torch.randn(2, H * D, generator=torch.Generator().manual_seed(2))


def attend(x, attention_mask):
    """Heads are computed on after they were transposed, as a rotation does."""
    places = torch.arange(x.shape[1])
    visible = (places <= places[:, None]) & (attention_mask[:, None, None] != 0)
    q = x.unflatten(-1, (H, D)).transpose(1, 2) * torch.linspace(0, 1, x.shape[1])[:, None]
    return F.scaled_dot_product_attention(q, q.cos(), q.sin(), visible).transpose(1, 2).flatten(2)


def gradient(function):
    x = torch.randn(B, L, H * D, generator=torch.Generator().manual_seed(1)).requires_grad_()
    mask = masks(RIGHT)
    return torch.autograd.grad((function(x, mask) * mask[..., None]).square().sum(), x)[0]


def test_a_backward_takes_heads_that_were_transposed_and_computed_on():
    torch.testing.assert_close(gradient(torch.compile(attend, backend="packc", options=STRICT)), gradient(attend))


def join(x, attention_mask):
    """What is saved is also written beside something else, as zamba2 writes its embeddings."""
    x = packc.ops.causal_conv1d(x * attention_mask[..., None], torch.ones(H * D, 2))
    rows = F.embedding((x[..., 0] > 0).long(), TABLE)
    joined = torch.cat([x, rows], -1)
    return x * rows * (joined @ torch.ones(2 * H * D, H * D))


def test_a_backward_takes_what_was_joined_to_something():
    torch.testing.assert_close(gradient(torch.compile(join, backend="packc", options=STRICT)), gradient(join))


def split(x, attention_mask):
    """What is saved are parts of what is computed, as Mamba-2 splits its convolution's result."""
    is_token = attention_mask[..., None]
    parts = (packc.ops.causal_conv1d(x * is_token, torch.ones(H * D, 2)) * is_token).split([4, 2, 2], -1)
    values, keys, queries = (part.unflatten(-1, (-1, 2)) for part in parts)
    steps = torch.ones(*x.shape[:2], 2) * is_token
    return packc.ops.ssd(values, steps, torch.full((2,), -0.5), keys, queries).flatten(2).repeat(1, 1, 2)


def test_a_backward_takes_parts_of_what_is_computed():
    torch.testing.assert_close(gradient(torch.compile(split, backend="packc", options=STRICT)), gradient(split))


def test_without_it_inductor_refuses_them(monkeypatch):
    """Should this pass one day, the file has done its service."""
    monkeypatch.setattr(packc.inner_backend, "keep_strides", lambda gm: None)
    no_cache = torch._functorch.config.patch(enable_autograd_cache=False)
    with no_cache, pytest.raises(AssertionError, match="expected size"):
        gradient(torch.compile(attend, backend="packc", options=STRICT))


def test_contiguous_values_are_left_alone():
    held = []
    lower = kept_strides._lower

    def model(x, attention_mask):
        x = packc.ops.causal_conv1d(x * attention_mask[..., None], torch.ones(H * D, 2))
        return x.cos() * x.sin()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept_strides, "_lower", lambda: held.append(lower()))
        gradient(torch.compile(model, backend="packc", options=STRICT))
    assert held == []
