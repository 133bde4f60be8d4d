"""Which input is taken for the padding mask."""

import pytest
import torch
from harness import RIGHT, masks

import packc


def taken(function, *inputs) -> bool:
    torch._dynamo.reset()
    return packc.explain(function)(*inputs).tokens is not None


TAPS = torch.randn(4, 2)


def mix(x):
    return packc.ops.causal_conv1d(x, TAPS)


X, MASK = torch.randn(3, 8, 4), masks(RIGHT)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_a_known_name_of_any_dtype(dtype):
    assert taken(lambda x, attention_mask: x * attention_mask[..., None], X, MASK.to(dtype))
    assert taken(lambda x, padding_mask: mix(x * padding_mask[..., None]), X, MASK.to(dtype))
    assert taken(lambda x, conv_mask: mix(x * conv_mask[..., None]), X, MASK.to(dtype))
    assert taken(lambda x, mask: mix(x.masked_fill(mask[..., None] == 0, 0.0)), X, MASK.to(dtype))


def test_not_a_mask_that_is_added_to_scores():
    additive = torch.zeros(3, 8).masked_fill(MASK == 0, -torch.inf)
    assert not taken(lambda x, mask: (x.sum(-1) + mask).softmax(-1), X, additive)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, padding_mask: mix(x.masked_fill(padding_mask[..., None] == 1, 0.0)),
        lambda x, pad_mask: mix(x * (1 - pad_mask)[..., None]),
        lambda x, mask: mix(x * ~mask.bool()[..., None]),
    ],
)
def test_not_a_mask_that_is_one_at_padding(function):
    assert not taken(function, X, MASK)


def test_not_an_attention_mask_that_is_one_at_padding():
    padding = MASK == 0
    assert not taken(lambda x, attention_mask: mix(x.masked_fill(attention_mask[..., None], 0.0)), X, padding)
    assert not taken(lambda x, attention_mask: mix(x * ~attention_mask[..., None]), X, padding)
    assert not taken(lambda x, attention_mask: mix(x * (1 - attention_mask)[..., None]), X, padding.float())


OPPOSITES = {
    "ne": lambda x, m: x * (m != 1),
    "lt": lambda x, m: x * (m < 1),
    "xor": lambda x, m: x * (m ^ 1),
    "distance": lambda x, m: x * (m - 1).abs(),
    "filled with ones": lambda x, m: torch.where(m == 1, torch.zeros_like(x), x),
    "looked up": lambda x, m: x * torch.tensor([1.0, 0.0])[m],
}


@pytest.mark.parametrize("name", OPPOSITES)
def test_not_an_attention_mask_whose_opposite_is_written_in_another_way(name):
    """Trusted by its name: it would be zero at all tokens."""
    assert not taken(lambda x, attention_mask: mix(OPPOSITES[name](x, attention_mask[..., None])), X, 1 - MASK)


def test_not_a_mask_of_what_counts_in_the_loss():
    assert not taken(lambda x, mask: (mix(x).square().mean(-1) * mask).sum() / mask.sum(), X, MASK)


def test_not_one_of_another_purpose_or_shape():
    assert not taken(lambda x, loss_mask: mix(x * loss_mask[..., None]), X, MASK)
    assert not taken(lambda x, mask: mix(x * mask), X, MASK[..., None])


def test_the_attention_mask_goes_before_any_other():
    def function(x, attention_mask, mask):
        return x * attention_mask[..., None] * mask[..., None]

    report = packc.explain(function)(X, MASK, torch.ones_like(MASK))
    assert report.tokens == 15


def test_an_argument_inside_keyword_arguments():
    def function(x, **kwargs):
        return x * kwargs["attention_mask"][..., None]

    report = packc.explain(function)(X, attention_mask=MASK)
    assert report.tokens == 15
