"""Grad mode and autocast switched inside a graph hold for the packed ops as they did for the padded ones."""

import torch
from harness import RIGHT, RecordingBackend, masks

import packc

TAPS, W = torch.randn(4, 3), torch.randn(4, 4)


def switching(x, attention_mask):
    x = x * attention_mask[..., None]
    with torch.autocast("cpu", torch.bfloat16):
        y = x @ W
        with torch.autocast("cpu", enabled=False):
            y = y.float() @ W
        z = x @ W
    with torch.no_grad():
        # The mask is first gathered for this region again: a gather made under no_grad must not serve the rest.
        gate = (x @ W).mean(-1, keepdim=True) + attention_mask[..., None]
    return packc.ops.causal_conv1d(y * z * gate * attention_mask[..., None], TAPS).sum(-1)


def test_values_and_gradients_are_those_of_eager():
    mask = masks(RIGHT)
    results = []
    backend = RecordingBackend()
    for function in (switching, torch.compile(switching, backend=backend, fullgraph=True)):
        x = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
        out = function(x, mask)
        (out * mask).sum().backward()
        results.append((out.detach()[mask.bool()], x.grad))
    assert not backend.reasons
    for eager, packed in zip(*results, strict=True):
        torch.testing.assert_close(packed, eager)


def test_a_float_input_first_read_under_no_grad_still_gets_its_gradient():
    def function(x, attention_mask):
        with torch.no_grad():
            scale = x.square().mean(-1, keepdim=True)
        return packc.ops.causal_conv1d(x * scale * attention_mask[..., None], TAPS)

    x, mask = torch.randn(3, 8, 4, requires_grad=True), masks(RIGHT)
    torch.compile(function, backend="packc", options={"packc.inner": "aot_eager"})(x, mask).sum().backward()
    actual, x.grad = x.grad, None
    (function(x, mask) * mask[..., None]).sum().backward()
    torch.testing.assert_close(actual, x.grad)
