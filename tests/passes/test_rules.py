"""Each rule says the truth: an op on packed operands is the packed result of the op on padded ones.

Every snippet is traced on padded inputs, packed, and run on both; they must agree at every token, and the packed graph
must really work on tokens.
"""

import pytest
import torch
from harness import RecordingBackend, masks
from snippets import SNIPPETS, H
from torch.fx.experimental.proxy_tensor import make_fx

import packc
from packc.ops.mixer import MIXERS
from packc.passes.rules import RULES

TAPS = torch.randn(H, 2, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", SNIPPETS)
def test_packing_commutes_with(name):
    mask = masks(["1111", "1110", "1100", "0110"])

    def after_a_mixer(x, mask):
        # What comes out of a mixer exists packed only: the snippet must work on tokens, or the graph is not packed.
        return SNIPPETS[name](packc.ops.causal_conv1d(x * mask[..., None], TAPS), mask)

    x, backend = torch.randn(H, H, H), RecordingBackend("eager")
    expected = after_a_mixer(x, mask)
    actual = torch.compile(after_a_mixer, backend=backend, fullgraph=True)(x, mask)
    assert not backend.reasons
    assert backend.op_count(torch.ops.packc.unpack.default) == 1
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()])
    assert actual[mask == 0].eq(0).all()


def ops_of(function):
    """The ops that a snippet is made of."""
    graph = make_fx(function, pre_dispatch=True)(torch.randn(H, H, H), torch.ones(H, H, dtype=torch.int64))
    return {node.target for node in graph.graph.nodes if node.op == "call_function"}


def test_no_rule_is_untried():
    tried = set().union(*map(ops_of, SNIPPETS.values()))
    mixers = {getattr(torch.ops.packc, name).default for name in MIXERS}  # test_mixers.py
    assert set(RULES) - tried == {*mixers, torch.ops.packc.cross_attention.default}  # test_cross_attention.py
