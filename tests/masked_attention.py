"""Attention behind a mixer of packc's, under masks of padding, and what it is compared by."""

import torch
from harness import RecordingBackend
from torch.nn import functional as F

import packc

B, L, H, D = 3, 8, 2, 4
TAPS = torch.randn(H * D, 3, generator=torch.Generator().manual_seed(1))
STRICT = {"packc.inner": "aot_eager", "packc.strict": True}
CONV, ATTENTION = "packc.causal_conv1d.default", "aten.scaled_dot_product_attention.default"


def heads(x):
    return x.unflatten(-1, (H, D)).transpose(1, 2)


def attend(x, attention_mask, mask=None, **options):
    """A mixer of packc's, attention over what it gives, and what is done token by token afterwards."""
    x = packc.ops.causal_conv1d(x * attention_mask[..., None], TAPS, activation="silu")
    mixed = F.scaled_dot_product_attention(heads(x), heads(x.cos()), heads(x.sin()), attn_mask=mask, **options)
    return F.layer_norm(x + mixed.transpose(1, 2).flatten(2), (H * D,))


def causal(m):
    places = torch.arange(m.shape[1])
    return (places <= places[:, None]) & (m[:, None, None] != 0)


def step(function, x, *args):
    leaf = x.clone().requires_grad_()
    out = function(leaf, *args)
    real = args[0].bool()
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (grad,) = torch.autograd.grad((out * weight)[real].sum(), leaf)
    return out[real], grad


def reason_of(model, *inputs):
    torch._dynamo.reset()
    backend = RecordingBackend()
    actual = torch.compile(model, backend=backend)(*inputs)
    torch.testing.assert_close(actual, model(*inputs))
    (reason,) = backend.reasons
    return reason
