"""Padding that has to stay in the pack stays with all that it is made from."""

import pytest
import torch
from harness import BOTH, masks
from torch.nn import functional as F

import packc

H = 4
TAPS = torch.randn(H, 3, generator=torch.Generator().manual_seed(1))
OPTIONS = {"packc.inner": "aot_eager"}


@pytest.mark.filterwarnings("ignore:packc left")
def test_a_state_after_unmasked_padding_on_both_sides():
    def function(x, attention_mask):
        mixed, state = packc.ops.causal_conv1d(x, TAPS, output_final_state=True)
        return (mixed * attention_mask[..., None]).sum(), state

    x, mask = torch.randn(3, 8, H), masks(BOTH)
    torch.testing.assert_close(torch.compile(function, backend="packc", options=OPTIONS)(x, mask), function(x, mask))


@pytest.mark.filterwarnings("ignore:packc left")
def test_a_mixer_that_reads_what_attention_gives_at_padding():
    def function(x, attention_mask):
        places = torch.arange(x.shape[1])
        visible = (attention_mask != 0)[:, None, None] & (places <= places[:, None])
        mixed = F.scaled_dot_product_attention(*[x[:, None]] * 3, torch.where(visible, 0.0, -1e9))[:, 0]
        # Before a row's first token all keys are hidden alike, and so seen alike, those behind the last one too.
        return packc.ops.causal_conv1d(mixed, TAPS)

    x, mask = torch.randn(3, 8, H), masks(BOTH)
    got, want = torch.compile(function, backend="packc", options=OPTIONS)(x, mask), function(x, mask)
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()])
