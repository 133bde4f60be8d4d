"""Which input is taken for the padding mask."""

import pytest
import torch
from harness import RIGHT, masks

import packc


def taken(function, *inputs) -> bool:
    torch._dynamo.reset()
    return packc.explain(function)(*inputs).tokens is not None


X, MASK = torch.randn(3, 8, 4), masks(RIGHT)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_a_known_name_of_any_dtype(dtype):
    assert taken(lambda x, attention_mask: x * attention_mask[..., None], X, MASK.to(dtype))
    assert taken(lambda x, padding_mask: x * padding_mask[..., None], X, MASK.to(dtype))


def test_not_a_mask_that_is_added_to_scores():
    additive = torch.zeros(3, 8).masked_fill(MASK == 0, -torch.inf)
    assert not taken(lambda x, mask: (x.sum(-1) + mask).softmax(-1), X, additive)


def test_not_one_of_another_purpose_or_shape():
    assert not taken(lambda x, loss_mask: x * loss_mask[..., None], X, MASK)
    assert not taken(lambda x, mask: x * mask, X, MASK[..., None])


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
