"""Summaries of many segments, folded by one op to what enters behind them."""

import pytest
import torch
from mixers import MIXERS as ALL
from summaries import RECURRENCES, Recurrence, assert_equal, in_dtype
from torch.utils.flop_counter import FlopCounterMode

# The convolution has a summary too; what it sums up is tried in test_convolution_summary.py.
CONVOLUTION = Recurrence("causal_conv1d", lambda L: {"bias": None, **ALL["causal_conv1d"].make(1, L)})
FOLDED = [*(each for each in RECURRENCES.values() if not each.variant), CONVOLUTION]
WAYS = {"fold": (True, lambda summary: summary.through), "fold_adjoint": (False, lambda s: s.through_adjoint)}
pytestmark = [
    pytest.mark.parametrize("recurrence", FOLDED, ids=lambda each: each.name),
    pytest.mark.parametrize("what", WAYS),
]


def op_of(recurrence, what):
    return getattr(torch.ops.packc, f"{recurrence.name}_{what}").default


def arguments(recurrence, segments, dtype=torch.float64):
    """Transitions and states of segments of three tokens each, weights, and which segments count and begin anew."""
    torch.manual_seed(segments)
    tensors = in_dtype(recurrence.make(3 * segments), dtype)
    parts = [recurrence.of_tokens(tensors, 3 * n, 3 * n + 3) for n in range(segments)]
    transitions, states = (torch.cat(each) for each in zip(*(recurrence.summarize(x, 0) for x in parts), strict=True))
    upstream, ends = torch.arange(segments) != segments // 2, torch.arange(segments) == 1
    weights = [tensors[name] for name in recurrence.summary.through_takes]
    return transitions, states, *weights, upstream, ends


@pytest.fixture(params=[True, False], ids=["on host", "elsewhere"])
def _marks(request, monkeypatch):
    """Where it can be read which segments count."""
    monkeypatch.setattr("packc.ops.summary.on_host", lambda _: request.param)


@pytest.mark.usefixtures("_marks")
@pytest.mark.parametrize("segments", [1, 2, 5])
def test_it_is_a_walk_over_the_segments(recurrence, what, segments):
    to_right, through = WAYS[what]
    transitions, states, *weights, upstream, ends = given = arguments(recurrence, segments)
    named = dict(zip(recurrence.summary.through_takes, weights, strict=True))
    entering, order = torch.zeros_like(states[:1]), range(segments)
    for n in list(order if to_right else reversed(order))[:-1]:
        if upstream[n]:
            passed = 0 if ends[n] else through(recurrence.summary)(transitions[n : n + 1], entering, named)
            entering = passed + states[n : n + 1]
    found = op_of(recurrence, what)(*given)
    if to_right:
        found, kept = found
        assert torch.equal(kept, transitions)
        assert kept.untyped_storage().data_ptr() != transitions.untyped_storage().data_ptr()
    assert_equal(found, entering, 1e-12)


@pytest.mark.usefixtures("_marks")
def test_a_nan_stays_in_its_document(recurrence, what):
    transitions, states, *rest, _, _ = arguments(recurrence, 4)
    first = 0 if what == "fold" else 3
    transitions[first], states[first] = torch.nan, torch.nan
    ends = torch.arange(4) == (1 if what == "fold" else 2)
    found = op_of(recurrence, what)(transitions, states, *rest, torch.ones(4, dtype=torch.bool), ends)
    for each in [found] if what != "fold" else found[:1]:
        assert not each.isnan().any()


def test_opcheck(recurrence, what):
    given = [x.requires_grad_() if x.is_floating_point() else x for x in arguments(recurrence, 3, torch.float32)]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op_of(recurrence, what), tuple(x.detach() for x in given), test_utils=tests)
    torch.library.opcheck(op_of(recurrence, what), given, test_utils=tests[:3])


def test_gradcheck(recurrence, what):
    given = [x.requires_grad_() if x.is_floating_point() else x for x in arguments(recurrence, 3)]
    if recurrence is CONVOLUTION:  # whose transition is a number of places
        given[0] = given[0].detach()
    assert torch.autograd.gradcheck(op_of(recurrence, what), given, fast_mode=True)


def test_its_flops_grow_with_the_segments(recurrence, what):
    def flops(segments):
        with FlopCounterMode(display=False) as counter:
            op_of(recurrence, what)(*arguments(recurrence, segments, torch.float32))
        return sum(count for op, count in counter.get_flop_counts()["Global"].items() if str(op).endswith(f"_{what}"))

    assert flops(5) == 4 * flops(2) > 0
