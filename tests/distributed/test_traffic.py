"""What travels is what the formulas say, and does not depend on how many tokens there are."""

import math

import pytest
from mixers import MIXERS
from sharded_work import order_of_graph, order_of_step, traffic_of_graph, traffic_on_wire

from packc.distributed.cost import Network, quickest, traffic
from packc.ops.mixer import MIXERS as DECLARED
from packc.ops.shapes import Shape

EXCHANGES = ["all_gather", "ring", "doubling"]
OTHERS = ["gated_delta_rule", "causal_conv1d"]
REST = ["linear_attention", "linear_scan", *OTHERS]


def bytes_of(name):
    """Of a transition and of a state, in fp32."""
    mixer, declared = MIXERS[name], DECLARED[MIXERS[name].function.__name__]
    shapes = {name: x.shape for name, x in mixer.make(1, 8).items()}
    sizes = declared.shapes.sizes({name: shapes.get(name) for name in declared.tensor_names})
    return 4 * math.prod(Shape(declared.summary.transition).of(sizes)), 4 * math.prod(mixer.state)


def most(found):
    return [max(of_ranks) for of_ranks in zip(*found, strict=True)]


@pytest.mark.parametrize("exchange", [*EXCHANGES, "neighbour"])
@pytest.mark.parametrize("name", ["selective_scan", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_bytes_in_the_graph(ranks, name, exchange):
    size = 2 if exchange == "neighbour" else 4
    expected = traffic(exchange, size, *bytes_of(name))
    for tokens in (64, 2**20):
        forward, collectives, backward, again = most(ranks.run(traffic_of_graph, size, name, exchange, tokens))
        assert (forward, backward) == (expected.forward, expected.backward)
        # A shift is two collectives, of pairs that have no rank in common, at once.
        assert collectives == again
        assert expected.starts <= collectives <= 2 * expected.starts


@pytest.mark.parametrize("name", ["linear_attention", "ssd", "causal_conv1d"])
def test_ops_that_take_late_states_run_while_they_travel(ranks, name):
    for order in ranks.run(order_of_graph, 2, name):
        gather, wait = "all_gather_into_tensor", "wait_tensor"
        assert order == [gather, "", wait, "_enter", gather, "_bwd", wait, "_leave"]


@pytest.mark.parametrize("name", ["selective_scan", "ssd", *(pytest.param(n, marks=pytest.mark.slow) for n in REST)])
def test_a_rank_that_no_document_enters_does_not_wait_nor_one_that_none_leaves(ranks, name):
    gather, wait = "all_gather_into_tensor", "wait_tensor"
    late = MIXERS[name].declaration.summary.late is not None
    entered = [gather, "", wait, "_enter"] if late else [gather, wait, ""]
    left = [gather, "_bwd", wait, "_leave"] if late else [gather, wait, "_bwd"]
    first, last = ranks.run(order_of_step, 2, name)
    assert first == [gather, "", wait, *left]
    assert last == [*entered, gather, "_bwd", wait]


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_bytes_on_the_wire(ranks, exchange):
    heads, size = 2, 64
    expected = sum(traffic(exchange, 4, 4 * heads, 4 * heads * size**2)[:2])
    if exchange == "doubling":  # no rank receives in every step both ways: of four, none more than in three of four
        expected = expected * 3 // 4
    for tokens in (64, 2**16):
        found = max(ranks.run(traffic_on_wire, 4, exchange, tokens, heads, size))
        # gloo tells in 50 bytes what it sends, and a barrier goes before and after.
        assert expected <= found <= expected + 2000


def test_the_quickest_exchange_depends_on_the_network():
    state = 2**20
    assert quickest(2, 0, state, near=False) == "all_gather"
    assert quickest(2, 0, state, near=True) == "neighbour"
    assert quickest(64, 4, state, near=False) == "doubling"
    assert quickest(64, 4, state, near=True) == "neighbour"
    # Matrices for transitions, and a network on which bytes are all that counts.
    assert quickest(4, 8 * state, state, near=False, network=Network(start=0, hop=0)) == "ring"
