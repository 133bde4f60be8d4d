"""Attention whose queries choose their keys by what the model computes of tokens, with ops that no rule follows."""

import pytest
import torch
from harness import BOTH, LEFT, RIGHT, masks
from masked_attention import CONV, STRICT, TAPS, B, D, H, L, causal, heads, reason_of, step
from torch import nn
from torch.nn import functional as F

import packc


class Chooses(nn.Module):
    """Attention over the two keys of which ``scores (B, L, L)`` think most among those before a query."""

    def __init__(self, scores):
        super().__init__()
        torch.manual_seed(0)
        self.index, self.scores = nn.Linear(H * D, 3), scores

    def forward(self, x, attention_mask):
        x = packc.ops.causal_conv1d(x * attention_mask[..., None], TAPS, activation="silu") + 1
        with torch.no_grad():
            seen = causal(attention_mask)
            scores = self.scores(self.index(x), attention_mask).masked_fill(~seen[:, 0], -1e9)
            chosen = torch.zeros_like(scores).scatter(-1, scores.topk(2).indices, 1.0) != 0
        mixed = F.scaled_dot_product_attention(
            heads(x), heads(x.cos()), heads(x.sin()), attn_mask=chosen[:, None] & seen
        )
        return F.layer_norm(x + mixed.transpose(1, 2).flatten(2), (H * D,))


def of_pairs(index, m):
    return index @ index.mT


def of_pools(index, m):
    """As much as the best of four tokens, of which each starts at the row's first."""
    place = m.argmax(1, keepdim=True) + torch.arange(L)
    keys = (
        index.gather(1, place.clamp(max=L - 1)[..., None].expand_as(index))
        * m.gather(1, place.clamp(max=L - 1))[..., None]
    )
    return index @ keys.unflatten(1, (2, 4)).amax(2).repeat_interleave(4, 1).mT


def of_padding(index, m):
    """The more a key looks like the sum of its row, padding too."""
    return of_pairs(index, m) * (index @ index.sum(1, keepdim=True).mT)


def of_zeros(index, m):
    """By how many places of a row are zero: what is scattered back is, at padding."""
    return of_pairs(index, m) + (index == 0).all(-1).sum(1)[:, None, None] * torch.arange(L)


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("scores", [of_pairs, of_pools])
def test_keys_chosen_among_tokens_let_the_graph_pack(scores, dynamic):
    model = Chooses(scores).forward  # of a module, the caller might read padding
    compiled = torch.compile(model, backend="packc", options=STRICT, dynamic=dynamic)
    x = torch.randn(B, L, H * D)
    for rows in (RIGHT, LEFT, BOTH):
        torch.testing.assert_close(step(compiled, x, masks(rows)), step(model, x, masks(rows)), rtol=1e-4, atol=1e-5)
    report = packc.explain(model)(x, masks(RIGHT))
    assert [each.op for each in report.mixers if each.packed] == [CONV]
    assert report.tokens == 15


@pytest.mark.parametrize("scores", [of_padding, of_zeros])
def test_keys_that_hang_on_padding_do_not(scores):
    assert "is not zero at padding" in reason_of(Chooses(scores), torch.randn(B, L, H * D), masks(RIGHT))
