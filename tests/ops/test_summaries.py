"""Segments of a sequence, summarised one by one, say what the whole sequence does to a state."""

from itertools import pairwise

import pytest
import torch
from budget import skip_if, skip_if_interpreted
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from implementations import opcheck
from selective_scan_data import offsets
from summaries import RECURRENCES, agree_with_fp64, assert_equal, in_dtype, poison
from torch.utils.flop_counter import FlopCounterMode

pytestmark = pytest.mark.parametrize("recurrence", RECURRENCES.values(), ids=RECURRENCES)

few = settings(
    max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
lengths_of_documents = st.lists(st.sampled_from([0, 1, 2, 5, 17, 66]), min_size=1, max_size=3)
places = st.lists(st.integers(0, 200), max_size=5)


def parts(cuts, L):
    """Consecutive parts of L tokens, some of them empty."""
    return list(pairwise([0, *sorted(min(cut, L) for cut in cuts), L]))


def make(recurrence, L, dtype=torch.float64):
    torch.manual_seed(L)
    return in_dtype(recurrence.make(L), dtype)


def states(recurrence, tensors, documents):
    mixer = recurrence.mixer
    sizes = mixer.shapes.sizes({name: None if x is None else x.shape for name, x in tensors.items()})
    return torch.randn(mixer.state_shape(sizes, documents), dtype=torch.float64)


# ---- segments make up the whole --------------------------------------------------------------------------------------


@few
@given(lengths=lengths_of_documents, cuts=places)
def test_summaries_folded_left_to_right_are_the_final_state(recurrence, lengths, cuts):
    L, starts = sum(lengths), offsets(lengths)
    tensors = make(recurrence, L)
    initial = states(recurrence, tensors, len(lengths))
    _, final = recurrence.call(tensors, starts, initial)
    for n, (first, last) in enumerate(pairwise(starts.tolist())):
        state = initial[n : n + 1]
        for begin, end in parts(cuts, L):
            # The tokens of the document in this part, with those of others in front of them.
            end = min(end, last)
            if end < max(first, begin):
                continue
            before = max(first, begin) - begin
            part = recurrence.of_tokens(tensors, begin, end)
            part = poison(part, 0, before, recurrence.mixer.per_token)
            transition, added = recurrence.summarize(part, before)
            state = recurrence.summary.through(transition, state, part) + added
        assert_equal(state, final[n : n + 1])


@few
@given(lengths=lengths_of_documents, cuts=places)
def test_adjoints_folded_right_to_left_are_the_gradient_of_the_initial_state(recurrence, lengths, cuts):
    L, starts = sum(lengths), offsets(lengths)
    tensors = make(recurrence, L)
    initial = states(recurrence, tensors, len(lengths)).requires_grad_()
    out, final = recurrence.call(tensors, starts, initial)
    dout, dfinal = torch.randn_like(out), torch.randn_like(final)
    (dinitial,) = torch.autograd.grad((out, final), initial, (dout, dfinal))
    for n, (first, last) in enumerate(pairwise(starts.tolist())):
        dstate = dfinal[n : n + 1]
        for begin, end in reversed(parts(cuts, L)):
            # The tokens of the document in this part, with those of others behind them.
            begin = max(begin, first)
            if min(end, last) < begin:
                continue
            of_document = min(end, last) - begin
            part = poison(
                {**recurrence.of_tokens(tensors, begin, end), "dout": dout[:, begin:end]},
                of_document,
                end - begin,
                (*recurrence.mixer.per_token, "dout"),
            )
            transition, _ = recurrence.summarize(recurrence.of_tokens(part, 0, of_document), 0)
            passed = recurrence.summary.through_adjoint(transition, dstate, part)
            dstate = passed + recurrence.adjoin(part["dout"], part, of_document)
        assert_equal(dstate, dinitial[n : n + 1])


def three_segments(recurrence):
    tensors = make(recurrence, 9)
    segments = [recurrence.of_tokens(tensors, begin, end) for begin, end in ((0, 4), (4, 5), (5, 9))]
    return tensors, [recurrence.summarize(segment, 0)[0] for segment in segments]


def test_transitions_compose_in_any_order_of_brackets(recurrence):
    tensors, (first, second, third) = three_segments(recurrence)
    compose, whole = recurrence.summary.compose, recurrence.summarize(tensors, 0)[0]
    assert_equal(compose(compose(first, second), third), whole)
    assert_equal(compose(first, compose(second, third)), whole)


def test_a_composed_transition_takes_a_state_through_both_segments(recurrence):
    tensors, (first, second, _) = three_segments(recurrence)
    through, state = recurrence.summary.through, states(recurrence, tensors, 1)
    both = through(recurrence.summary.compose(first, second), state, tensors)
    assert_equal(both, through(second, through(first, state, tensors), tensors))


def test_gradients_pass_by_the_transpose(recurrence):
    tensors, (transition, *_) = three_segments(recurrence)
    state, dstate = states(recurrence, tensors, 1), states(recurrence, tensors, 1)
    forwards = recurrence.summary.through(transition, state, tensors) * dstate
    assert_equal((state * recurrence.summary.through_adjoint(transition, dstate, tensors)).sum(), forwards.sum())


def test_many_transitions_are_applied_at_once(recurrence):
    """As many segments as a leading axis has, one by one or gathered."""
    tensors, transitions = three_segments(recurrence)
    state = torch.cat([states(recurrence, tensors, 1) for _ in transitions])
    for apply in (recurrence.summary.through, recurrence.summary.through_adjoint):
        each = [apply(transition, state[n : n + 1], tensors) for n, transition in enumerate(transitions)]
        assert_equal(apply(torch.cat(transitions), state, tensors), torch.cat(each))


# ---- kernels ---------------------------------------------------------------------------------------------------------


# Chunks and, interpreted, segments have 64 tokens: where one ends, and on both sides of that; all tokens, one and none.
PLACES = [(68, 3), (150, 0), (150, 128), (150, 130), (150, 149), (66, 66), (0, 0)]


@pytest.mark.parametrize(
    ("dtype", "L", "place"), [(torch.bfloat16, 150, 70), *((torch.float32, *place) for place in PLACES)]
)
def test_kernels_agree_with_fp64_and_read_no_other_token(recurrence, kernels, dtype, L, place):
    if kernels == "triton":
        skip_if((L, dtype) != (68, torch.float32) or recurrence.variant)
    agree_with_fp64(recurrence, make(recurrence, L, dtype), place)


def test_runs_are_bitwise_reproducible_for_any_number_of_threads(recurrence, kernels):
    if kernels != "cpu":
        pytest.skip("of the C++ kernels")
    tensors, threads = make(recurrence, 150, torch.float32), torch.get_num_threads()
    dout = torch.randn_like(tensors[recurrence.mixer.like])
    first = (*recurrence.summarize(tensors, 3), recurrence.adjoin(dout, tensors, 140))
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results = (*recurrence.summarize(tensors, 3), recurrence.adjoin(dout, tensors, 140))
            assert all(torch.equal(result, before) for result, before in zip(results, first, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_strided_inputs_equal_contiguous_ones(recurrence, kernels):
    skip_if_interpreted(kernels)
    tensors = make(recurrence, 70, torch.float32)
    dout = torch.randn_like(tensors[recurrence.mixer.like])
    views = [lambda x: x.repeat_interleave(2, -1)[..., ::2], lambda x: x.transpose(1, -1).contiguous().transpose(1, -1)]
    for view in views:
        strided = {name: x if x is None or x.ndim < 2 else view(x) for name, x in tensors.items()}
        results = (*recurrence.summarize(strided, 3), recurrence.adjoin(view(dout), strided, 67))
        expected = (*recurrence.summarize(tensors, 3), recurrence.adjoin(dout, tensors, 67))
        for result, as_before in zip(results, expected, strict=True):
            assert_equal(result, as_before, 1e-6)


def arguments(recurrence, tensors, what, place):
    takes = recurrence.summary.takes if what == "summary" else recurrence.summary.adjoint_takes
    taken = [{**tensors, **recurrence.options}[name] for name in takes]
    dout = () if what == "summary" else (torch.randn_like(tensors[recurrence.mixer.like]),)
    return (*dout, *taken, torch.tensor([place]))


def differentiable(given):
    return [x.detach().requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x for x in given]


@pytest.mark.parametrize("what", ["summary", "adjoint"])
def test_opcheck(recurrence, kernels, what):
    skip_if(kernels != "cpu")
    op = getattr(torch.ops.packc, f"{recurrence.name}_{what}").default
    given = arguments(recurrence, make(recurrence, 7, torch.float32), what, 3)
    opcheck(kernels, op, given)
    # Their derivatives are there in eager mode alone: a trace would ask how many tokens there are.
    torch.library.opcheck(op, differentiable(given), test_utils="test_autograd_registration")


@pytest.mark.parametrize("what", ["summary", "adjoint"])
def test_gradcheck(recurrence, what):
    op = getattr(torch.ops.packc, f"{recurrence.name}_{what}")
    given = differentiable(arguments(recurrence, make(recurrence, 4), what, 2))
    assert torch.autograd.gradcheck(op, given, fast_mode=True)


@pytest.mark.parametrize("what", ["summary", "adjoint"])
def test_a_compiler_knows_that_they_compute(recurrence, what):
    """By their FLOPs: what has none hides no exchange."""
    op = getattr(torch.ops.packc, f"{recurrence.name}_{what}")

    def flops(L):
        with FlopCounterMode(display=False) as counter:
            op(*arguments(recurrence, make(recurrence, L, torch.float32), what, 0))
        return counter.get_total_flops()

    assert flops(128) == 2 * flops(64) > 0


def test_one_graph_serves_every_segment(recurrence):
    skip_if(recurrence.variant)

    def both(tensors, dout, begin, end):
        given = {**tensors, **recurrence.options}
        summary = getattr(torch.ops.packc, f"{recurrence.name}_summary")
        adjoint = getattr(torch.ops.packc, f"{recurrence.name}_adjoint")
        return (
            *summary(*(given[name] for name in recurrence.summary.takes), begin),
            adjoint(dout, *(given[name] for name in recurrence.summary.adjoint_takes), end),
        )

    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend="aot_eager")
    for step, (L, begin, end) in enumerate([(70, 3, 70), (9, 0, 0), (130, 130, 64)]):
        tensors = make(recurrence, L, torch.float32)
        given = tensors, torch.randn_like(tensors[recurrence.mixer.like]), torch.tensor([begin]), torch.tensor([end])
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            results = compiled(*given)
        for result, expected in zip(results, both(*given), strict=True):
            assert_equal(result, expected, 1e-6)


# ---- arguments that do not fit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "error", "message"),
    [
        (torch.tensor([5]), ValueError, "begin must lie between 0 and L = 4, not be 5"),
        (torch.tensor([-1]), ValueError, "begin must lie between 0 and L = 4, not be -1"),
        (torch.tensor(0), ValueError, r"begin must have shape \(1,\)"),
        (torch.tensor([0], dtype=torch.int32), TypeError, "begin must be int64"),
    ],
)
def test_a_place_outside_of_the_tokens_raises(recurrence, place, error, message):
    op = getattr(torch.ops.packc, f"{recurrence.name}_summary")
    *given, _ = arguments(recurrence, make(recurrence, 4), "summary", 0)
    with pytest.raises(error, match=f"{recurrence.name}_summary: {message}"):
        op(*given, place)


def test_sizes_that_do_not_fit_raise(recurrence):
    tensors = make(recurrence, 4)
    like = tensors[recurrence.mixer.like]
    with pytest.raises(ValueError, match=f"{recurrence.name}_adjoint: dout must be one row"):
        recurrence.adjoin(like.expand(2, *like.shape[1:]), tensors, 0)
    with pytest.raises(ValueError, match=f"{recurrence.name}_adjoint: .* must have shape"):
        recurrence.adjoin(like[:, :3], tensors, 0)
