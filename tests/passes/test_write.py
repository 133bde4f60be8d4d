"""What a packed graph returns lies in memory as what the padded one returns."""

import pytest
import torch
from harness import BOTH, ONE_ROW, masks
from torch.nn import functional as F

import packc

H = 4
TAPS = torch.randn(H, 3, generator=torch.Generator().manual_seed(1))
OUTPUTS = {
    "as it is": lambda x: x * 2,
    "channels first": lambda x: F.conv1d(x.mT, TAPS[:, None], padding=2, groups=H)[..., : x.shape[1]].mT * 2,
    "transposed": lambda x: x.transpose(1, 2),
    "transposed and laid out": lambda x: x.transpose(1, 2).contiguous() + 1,
    "time first": lambda x: (x.transpose(0, 1).contiguous() * 2).transpose(0, 1),
    "heads": lambda x: x.unflatten(-1, (2, 2)).transpose(1, 2),
}


@pytest.mark.parametrize("rows", [BOTH, ONE_ROW], ids=["three rows", "one row"])
@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_keep_size_and_strides(name, rows):
    def model(x, attention_mask):
        return OUTPUTS[name](packc.ops.causal_conv1d(x * attention_mask[..., None], TAPS))

    mask = masks(rows)
    x = torch.randn(*mask.shape, H)
    options = {"packc.inner": "aot_eager", "packc.strict": True}
    got, want = torch.compile(model, backend="packc", options=options)(x, mask), model(x, mask)
    strides = zip(got.stride(), want.stride(), want.shape, strict=True)
    assert got.shape == want.shape
    assert all(a == b for a, b, size in strides if size > 1), (got.stride(), want.stride())
