"""While a graph is compiled the garbage collector leaves alone what is old, and afterwards it does as it did."""

import gc

import pytest
import torch

import packc
from packc.garbage import sparing_old_objects

B, L = 2, 8


def model(x, attention_mask):
    return packc.ops.causal_conv1d(x * attention_mask[..., None], torch.ones(4, 2))


def test_the_inner_backend_runs_without_collections_of_old_objects():
    before, during = gc.get_threshold(), []

    @torch._dynamo.register_backend(name="notes_thresholds")
    def notes_thresholds(gm, inputs):
        during.append(gc.get_threshold())
        return gm.forward

    options = {"packc.strict": True, "packc.inner": "notes_thresholds"}
    mask = torch.ones(B, L, dtype=torch.long)
    torch.compile(model, backend="packc", options=options)(torch.randn(B, L, 4), mask)
    assert during[0][:2] == before[:2]
    assert during[0][2] > 10**6
    assert gc.get_threshold() == before


def test_it_does_as_it_did_when_a_graph_is_refused():
    before = gc.get_threshold()
    with pytest.raises(packc.NotPacked), sparing_old_objects(), sparing_old_objects():
        raise packc.NotPacked("refused")
    assert gc.get_threshold() == before
