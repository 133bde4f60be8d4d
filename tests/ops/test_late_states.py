"""A state that comes late, or the gradient of one, makes of an op's results what they are with one in time."""

import pytest
import torch
from budget import skip_if
from mixers import MIXERS
from selective_scan_data import relative_error
from summaries import RECURRENCES, Recurrence, in_dtype, poison
from torch.utils.flop_counter import FlopCounterMode

from packc.ops.common.chunks import CHUNK
from packc.ops.common.late_states import BLOCK
from packc.ops.mixer import state_dtype
from packc.ops.registration import is_channel_first

LATE = {name: each for name, each in RECURRENCES.items() if each.summary.late is not None}
for activation in (None, "silu"):
    LATE[f"causal_conv1d, {activation}"] = Recurrence(
        "causal_conv1d", lambda L: {**MIXERS["causal_conv1d"].make(1, L)}, {"activation": activation}
    )


@pytest.fixture(params=LATE.values(), ids=LATE)
def recurrence(request):
    return request.param


class Case:
    """Three documents, of which the first goes on from the left and the last to the right."""

    def __init__(self, recurrence, lengths, dtype):
        torch.manual_seed(sum(lengths))
        self.mixer = recurrence.mixer
        self.tensors = tensors = in_dtype(recurrence.make(sum(lengths)), dtype)
        self.offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
        self.given = {**tensors, **recurrence.options, "cu_seqlens": self.offsets, "output_final_state": True}
        sizes = self.mixer.shapes.sizes({name: None if x is None else x.shape for name, x in tensors.items()})
        self.states, self.dfinal = torch.randn(
            2, *self.mixer.state_shape(sizes, 3), dtype=state_dtype(*tensors.values())
        )
        # A document without tokens here neither enters nor leaves.
        self.states, self.dfinal = (self.without(x, torch.tensor(lengths) == 0) for x in (self.states, self.dfinal))
        self.dout = torch.randn_like(tensors[self.mixer.like])
        self.end, self.begin = torch.tensor([lengths[0]]), torch.tensor([lengths[0] + lengths[1]])

    def without(self, states, document):
        left = states.clone()
        left[document] = 0
        return left

    def forward(self, initial):
        given = {**self.given, "initial_state": initial}
        return getattr(torch.ops.packc, self.mixer.name)(*(given[name] for name in self.mixer.arguments))

    def backward(self, kept, dfinal):
        given = {**self.given, "initial_state": self.states, "dout": self.dout, "dfinal_state": dfinal}
        given |= dict(zip(self.mixer.keeps, kept, strict=True))
        given |= {f"channel_first_d{name}": is_channel_first(given[name]) for name in self.mixer.own_layout}
        found = getattr(torch.ops.packc, f"{self.mixer.name}_bwd")(
            *(given[name] for name in self.mixer.backward_arguments)
        )
        return dict(zip(self.mixer.differentiable, found, strict=True))

    def poisoned(self, begin, end, names):
        """Arguments with NaN in some tokens."""
        return {**self.given, **poison(self.tensors, begin, end, tuple(names))}

    def enter(self, results):
        """Arguments of the op that corrects what it is given, which must read no other token."""
        names = self.mixer.summary.late.enter_takes
        given = self.poisoned(int(self.end), int(self.offsets[-1]), self.mixer.per_token)
        return *results, self.states[:1], *[given[name] for name in names], self.end, torch.tensor([0])

    def leave(self, grads):
        late = self.mixer.summary.late
        # Steps are factors of the gradient of what all tokens share.
        given = self.poisoned(0, int(self.begin), {*self.mixer.per_token} - {"dt"})
        taken = [given[name] for name in late.leave_takes]
        return *[grads[name] for name in late.leave_changes], self.dfinal[2:], self.states[2:], *taken, self.begin


def op(recurrence, what):
    return getattr(torch.ops.packc, f"{recurrence.name}_{what}").default


def assert_equal(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert relative_error(a, b) <= tolerance


LENGTHS = [
    (0, 3, 0), (1, 0, 2), (2, 1, 1), (CHUNK, 5, CHUNK), (CHUNK + 1, 70, 130), (150, 0, 67), (BLOCK + 70, 1, BLOCK + 1)
]  # fmt: skip


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_late_is_as_good_as_in_time(recurrence, lengths, on_host, kernels, monkeypatch):
    # Of the variants some hardly decay, so that states come as far as the next block.
    long = sum(lengths) > BLOCK
    skip_if(kernels == "triton" or (long if kernels == "reference" else recurrence.variant and not long))
    monkeypatch.setattr("packc.ops.summary.on_host", lambda _: on_host)
    case = Case(recurrence, lengths, torch.float32)
    results, late = case.forward(case.states), case.forward(case.without(case.states, 0))
    op(recurrence, "enter")(*case.enter(late))
    assert_equal(late, results, 1e-5)
    grads, late = case.backward(results[2:], case.dfinal), case.backward(results[2:], case.without(case.dfinal, 2))
    op(recurrence, "leave")(*case.leave(late))
    # The gradient of an initial state is the transition's to find.
    assert_equal(*(list(each.values())[:-1] for each in (late, grads)), 1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 0.02)])
def test_in_other_dtypes(recurrence, dtype, tolerance):
    case = Case(recurrence, (150, 5, 80), dtype)
    results, late = case.forward(case.states), case.forward(case.without(case.states, 0))
    op(recurrence, "enter")(*case.enter(late))
    assert_equal(late, results, tolerance)
    grads, late = case.backward(results[2:], case.dfinal), case.backward(results[2:], case.without(case.dfinal, 2))
    op(recurrence, "leave")(*case.leave(late))
    assert_equal(*(list(each.values())[:-1] for each in (late, grads)), tolerance)


def test_opcheck(recurrence):
    case = Case(recurrence, (5, 2, 4), torch.float32)
    results = case.forward(case.without(case.states, 0))
    grads = case.backward(results[2:], case.without(case.dfinal, 2))
    for what, arguments in (("enter", case.enter(results)), ("leave", case.leave(grads))):
        torch.library.opcheck(op(recurrence, what), arguments, test_utils=("test_schema", "test_faketensor"))


def test_a_compiler_knows_that_they_compute(recurrence):
    def flops(what, length):
        case = Case(recurrence, (length, 0, 0), torch.float32)
        results = case.forward(case.states)
        arguments = case.enter(results) if what == "enter" else case.leave(case.backward(results[2:], case.dfinal))
        with FlopCounterMode(display=False) as counter:
            op(recurrence, what)(*arguments)
        return counter.get_total_flops()

    for what in ("enter", "leave"):
        assert flops(what, 128) == 2 * flops(what, 64)
