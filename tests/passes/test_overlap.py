"""Orders of tasks: valid, one on all ranks, never slower than program order, within memory, near the best there is."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

from packc.passes.overlap import (
    Task,
    early_and_late,
    exact,
    hide_communication,
    list_schedule,
    program_order,
    simulate,
)
from packc.passes.overlap.costs import RATES, seconds_of
from packc.passes.overlap.policies import coarse, filled, fine
from packc.passes.overlap.tasks import collectives, is_valid, longest_ways, total
from packc.passes.overlap.timeline import peak

many = settings(max_examples=100, deadline=None, derandomize=True)


@st.composite
def steps(draw, longest=14):
    """Tasks in program order: compute, and collectives that are waited for, now or later."""
    tasks, pending = [], []
    for number in range(draw(st.integers(1, longest))):
        made = [n for n, task in enumerate(tasks) if task.kind != "start"]
        before = tuple(sorted(draw(st.sets(st.sampled_from(made), max_size=2)))) if made else ()
        kind = draw(st.sampled_from(["compute", "compute", "start", *(["wait"] * bool(pending))]))
        seconds, makes = draw(st.integers(1, 8)), draw(st.integers(0, 5))
        if kind == "wait":
            tasks.append(Task("wait", 0, (pending.pop(draw(st.integers(0, len(pending) - 1))),), "wait"))
        else:
            tasks.append(Task(f"{kind}{number}", seconds, before, kind, makes))
            pending += [number] if kind == "start" else []
    return [*tasks, *(Task("wait", 0, (start,), "wait") for start in pending)]


def seconds(tasks, order):
    return simulate([tasks], [order]).seconds


@many
@given(steps())
def test_every_order_is_valid_and_no_faster_than_can_be(tasks):
    least = max(total(tasks, "compute"), total(tasks, "start"), *longest_ways(tasks))

    def in_place(tasks):
        return filled(tasks, early_and_late(tasks), peak(tasks, early_and_late(tasks)))

    for policy in (program_order, early_and_late, list_schedule, in_place):
        order = policy(tasks)
        assert is_valid(tasks, order)
        assert seconds(tasks, order) >= least


@many
@given(steps())
def test_a_list_schedule_is_never_slower_nor_larger_than_program_order(tasks):
    order, usual = list_schedule(tasks), program_order(tasks)
    assert seconds(tasks, order) <= seconds(tasks, usual)
    assert peak(tasks, order) <= peak(tasks, usual)


def test_gradients_of_weights_are_put_off_under_what_the_next_layer_sends():
    """Of each layer of a backward: the gradient of its input, that of its weight, an exchange that the next one wants.
    Of gradients of outputs there is no room for more: each weight's is put off to the next exchange and no further."""
    tasks = [Task("loss", 1, (), makes=4)]
    for _ in range(6):
        at = len(tasks)
        tasks += [
            Task("input", 1, (at - 1,), makes=2),
            Task("weight", 1, (at - 1,), makes=0),
            Task("exchange", 1, (at,), "start", makes=2),
            Task("wait", 0, (at + 2,), "wait"),
        ]
    usual, order = program_order(tasks), list_schedule(tasks)
    assert seconds(tasks, usual) == 19
    assert seconds(tasks, order) == 14  # at the first exchange, memory is at its peak
    assert peak(tasks, order) == peak(tasks, usual) == 6
    assert seconds(tasks, list_schedule(tasks, memory=8)) == 13


@many
@given(steps(longest=7))
def test_it_is_near_the_best_order(tasks):
    if len(tasks) <= 9:
        assert seconds(tasks, exact(tasks)) <= seconds(tasks, list_schedule(tasks, memory=10**9))
        assert seconds(tasks, list_schedule(tasks, memory=10**9)) <= 1.5 * seconds(tasks, exact(tasks))


@many
@given(steps(), st.integers(2, 4), st.data())
def test_ranks_of_different_speeds_meet_in_every_collective(tasks, ranks, data):
    order = list_schedule(tasks)
    slower = [
        [
            Task(
                t.name, t.seconds * data.draw(st.integers(1, 3)) if t.kind == "compute" else t.seconds, t.after, t.kind
            )
            for t in tasks
        ]
        for _ in range(ranks)
    ]
    timeline = simulate(slower, [order] * ranks)
    for number in collectives(tasks, order):
        spans = {(i.begin, i.end) for rank in timeline.ranks for i in rank if i.task == number}
        assert len(spans) == 1
    assert timeline.seconds >= max(seconds(rank, order) for rank in slower)


def test_ranks_that_issue_collectives_in_different_orders_are_told():
    tasks = [Task(kind + name, 1, after, kind) for kind, name, after in
             [("start", "a", ()), ("start", "b", ()), ("wait", "a", (0,)), ("wait", "b", (1,))]]  # fmt: skip
    with pytest.raises(ValueError, match="different orders"):
        simulate([tasks, tasks], [[0, 1, 2, 3], [1, 0, 2, 3]])


def layer(seconds_of_communication=4, independent=4):
    """A summary that is exchanged, work that does not wait for it, and a correction that does."""
    return [
        Task("states", 2),
        Task("gather", seconds_of_communication, (0,), "start"),
        Task("wait", 0, (1,), "wait"),
        Task("correction", 1, (2,)),
        Task("inside chunks", independent),
        Task("sum", 1, (3, 4)),
    ]


def test_independent_work_hides_a_collective():
    assert seconds(layer(), program_order(layer())) == 12
    order = list_schedule(layer())
    assert [layer()[n].name for n in order] == ["states", "gather", "inside chunks", "wait", "correction", "sum"]
    timeline = simulate([layer()], [order])
    assert timeline.seconds == 8
    assert timeline.exposed == [0]


def test_what_cannot_be_hidden_is_exposed():
    timeline = simulate([layer(10, 4)], [list_schedule(layer(10, 4))])
    assert timeline.exposed == [6]


def test_memory_is_a_limit():
    """Work that would hide a collective makes more than may live beside it."""
    tasks = [replace(task, makes=4 if task.name in ("gather", "inside chunks") else 0) for task in layer()]
    assert peak(tasks, program_order(tasks)) == 4
    assert seconds(tasks, list_schedule(tasks)) == 12
    assert seconds(tasks, list_schedule(tasks, memory=8)) == 8


def encoder_and_model(kernels=6):
    """Optimus's case: an encoder whose kernels may fill the bubbles that a model's collectives leave."""
    encoder = [Task(f"encoder{n}", 1, (n - 1,) if n else ()) for n in range(kernels)]
    model, last = [], None
    for n in range(3):
        at = kernels + len(model)
        model += [
            Task(f"layer{n}", 2, () if last is None else (last,)),
            Task(f"reduce{n}", 2, (at,), "start"),
            Task("wait", 0, (at + 1,), "wait"),
        ]
        last = at + 2
    return [*encoder, *model, Task("join", 1, (kernels - 1, last))], range(kernels)


def test_coarse_moves_hide_one_bubble_and_fine_ones_all():
    tasks, encoder = encoder_and_model()
    assert seconds(tasks, program_order(tasks)) == 6 + 12 + 1
    assert seconds(tasks, coarse(tasks, encoder)) == 6 + 12 + 1 - 2
    assert seconds(tasks, fine(tasks, encoder)) == 12 + 1
    assert seconds(tasks, list_schedule(tasks)) == 12 + 1


# ---- graphs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def group():
    """Of two ranks, of which this process is the first and the other is not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield dist.group.WORLD
    dist.destroy_process_group()


def gather(x, group):
    gathered = torch.ops._c10d_functional.all_gather_into_tensor(x, 2, group.group_name)
    return torch.ops._c10d_functional.wait_tensor(gathered)


def exchanging(group):
    def run(x, w):
        states = x.sum(0, keepdim=True)
        gathered = gather(states, group)
        correction = gathered.sum(0)  # waits
        inside = (x @ w).relu()
        return inside @ w + correction

    return run


def targets(graph):
    return [
        str(node.target).removeprefix("aten.").rsplit(".", 1)[0] for node in graph.nodes if node.op == "call_function"
    ]


def test_in_a_graph_work_runs_between_start_and_wait(group):
    inputs = torch.randn(256, 64), torch.randn(64, 64)
    gm = make_fx(exchanging(group), tracing_mode="fake")(*inputs)
    before = targets(gm.graph)
    hidden = hide_communication(gm.graph)
    assert before.index("_c10d_functional.wait_tensor") < before.index("mm")
    after = targets(gm.graph)
    assert after.index("_c10d_functional.all_gather_into_tensor") < after.index("mm")
    assert after.index("relu") < after.index("_c10d_functional.wait_tensor")
    assert sorted(after) == sorted(before)
    assert hidden.after.seconds < hidden.before.seconds
    gm.recompile()
    torch.testing.assert_close(gm(*inputs)[0], exchanging(group)(*inputs)[0])


def test_what_writes_in_place_and_draws_stays_where_it_is(group):
    def run(x, w):
        gathered = gather(x.sum(0, keepdim=True), group)
        correction = gathered.sum(0)
        x.add_(1)
        noise = torch.rand_like(x)
        return (x @ w) * noise + correction

    gm = make_fx(run, tracing_mode="fake")(torch.randn(256, 64), torch.randn(64, 64))
    before = targets(gm.graph)
    hide_communication(gm.graph)
    after = targets(gm.graph)
    for name in ("add_", "rand_like"):
        others = set(before[: before.index(name)])
        assert others <= set(after[: after.index(name)])


def test_views_take_no_time():
    def run(x, w):
        return torch.ops.aten._unsafe_view(x.transpose(0, 1) @ w, [8, 2]).split(4)[0]

    nodes = make_fx(run)(torch.randn(4, 4), torch.randn(4, 4)).graph.nodes
    times = {node.name: seconds_of(node, RATES["cpu"]) for node in nodes if node.op == "call_function"}
    assert [name for name, each in times.items() if each] == ["mm"]


def test_what_hides_one_collective_is_not_taken_for_another():
    """The second has nothing but what is made under the first, which has another."""
    tasks = [
        Task("local", 4, ()),
        Task("gather", 3, (), "start"),
        Task("late", 4, ()),
        Task("wait", 0, (1,), "wait"),
        Task("joined", 1, (0, 3)),
        Task("gather", 3, (4,), "start"),
        Task("wait", 0, (5,), "wait"),
        Task("end", 1, (2, 6)),
    ]
    assert seconds(tasks, filled(tasks, program_order(tasks), 10**9)) == 10


def test_a_graph_without_collectives_stays(group):
    gm = make_fx(lambda x: (x @ x).relu())(torch.randn(4, 4))
    assert hide_communication(gm.graph) is None


def test_packc_has_inductor_keep_the_order(group):
    inputs = torch.randn(256, 64), torch.randn(64, 64)
    compiled = torch.compile(exchanging(group), backend="packc")
    _, (code,) = run_and_get_code(compiled, *inputs)
    body = code[code.index("def call(") :]
    places = [body.index(name) for name in ("all_gather_into_tensor", "extern_kernels.mm(", "wait_tensor")]
    assert places == sorted(places)
