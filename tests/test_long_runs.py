"""Training that goes on: over shapes of all kinds, after an interruption, beside other models, in threads."""

import copy
import gc
import io
import pickle
import random
import resource
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from harness import BOTH, LEFT, RIGHT, PlainLM, batch_of
from torch._dynamo.utils import counters
from torch.nn import functional as F

import packc

OPTIONS = {"packc.inner": "aot_eager", "packc.strict": True}


def compiled(model, **options):
    return torch.compile(model, backend="packc", options=OPTIONS | options)


class LM(PlainLM):
    """Its loss is that of transformers: no slice of the logits, whose size one would be another graph's."""

    def forward(self, ids, mask, labels):
        logits = self.head(self.hidden(ids, mask))
        following = F.pad(labels, (0, 1), value=-100)[:, 1:]
        return F.cross_entropy(logits.flatten(0, 1), following.flatten()), logits


def random_batch(draw, least):
    """Rows of 0 to L tokens, packed to either side."""
    B, L = draw.randint(least, 9), draw.randint(least, 40)
    rows = ["1" * (n := draw.randint(0, L)) + "0" * (L - n) for _ in range(B)]
    return batch_of([row[::-1] if draw.random() < 0.5 else row for row in rows]).values()


def in_use():
    """Objects of Python, and bytes of memory at most."""
    gc.collect()
    return len(gc.get_objects()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize(
    ("steps", "least", "graphs"),
    [
        (60, 2, 2),  # the first, of its sizes alone, and one of any
        pytest.param(2000, 2, 2, marks=pytest.mark.slow),
        pytest.param(2000, 1, 5, marks=pytest.mark.slow),  # and one each where B, L or both are 1, as torch has it
    ],
)
def test_steps_of_random_shapes_compile_a_bounded_number_of_graphs_and_keep_nothing(steps, least, graphs):
    counters.clear()
    draw, model = random.Random(0), LM(hidden=4, layers=1)
    step = compiled(model, **{"packc.strict": False})
    for n in range(steps):
        if n == steps // 2:
            objects, memory = in_use()
        loss, _ = step(*random_batch(draw, least))
        loss.backward()
        model.zero_grad()
    more_objects, more_memory = (now - then for now, then in zip(in_use(), (objects, memory), strict=True))
    assert counters["stats"]["unique_graphs"] <= graphs
    assert more_objects < steps / 4
    assert more_memory < 1 << 24


@pytest.mark.slow
@pytest.mark.parametrize(("dynamic", "graphs"), [(None, 5), (True, 4)])
def test_sizes_of_one_compile_what_torch_compiles_for_them_and_no_more(dynamic, graphs):
    shapes = [(3, 6), (2, 5), (1, 6), (3, 1), (1, 1), (4, 7), (1, 3), (2, 1), (1, 1), (1, 9)]

    def compiled_after_each(backend, options):
        torch._dynamo.reset()
        counters.clear()
        step = torch.compile(LM(hidden=4, layers=1), backend=backend, options=options, dynamic=dynamic)
        found = []
        for B, L in shapes:
            step(*batch_of(["1" * L] * B).values())
            found.append(counters["stats"]["unique_graphs"])
        return found

    ours = compiled_after_each("packc", {"packc.inner": "aot_eager"})
    assert ours == compiled_after_each("eager", None)
    assert ours[4:] == [graphs] * 6  # from the batch of one token on


def train(model, optimizer, steps):
    step = compiled(model)
    for n in steps:
        torch.manual_seed(n)
        optimizer.zero_grad()
        step(*batch_of([RIGHT, LEFT, BOTH][n % 3]).values())[0].backward()
        optimizer.step()


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def test_interrupted_and_resumed_training_equals_uninterrupted_bit_for_bit():
    model = PlainLM()
    again = copy.deepcopy(model)
    train(model, adam(model), range(6))
    optimizer, saved = adam(again), io.BytesIO()
    train(again, optimizer, range(3))
    torch.save((again.state_dict(), optimizer.state_dict()), saved)
    torch._dynamo.reset()
    resumed = PlainLM()
    optimizer = adam(resumed)
    saved.seek(0)
    for each, state in zip((resumed, optimizer), torch.load(saved), strict=True):
        each.load_state_dict(state)
    train(resumed, optimizer, range(3, 6))
    for name, value in model.state_dict().items():
        assert value.equal(resumed.state_dict()[name]), name


def gradients(call, model, rows):
    torch.manual_seed(0)
    return gradients_of(call, model, batch_of(rows))


def gradients_of(call, model, batch):
    model.zero_grad()
    call(*batch.values())[0].backward()
    return [p.grad.clone() for p in model.parameters()]


def assert_close(got, expected):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow  # as threads do
def test_two_models_in_one_process_keep_apart():
    models = [PlainLM(), PlainLM(hidden=6)]
    calls = [compiled(model) for model in models]
    for rows in (RIGHT, LEFT, RIGHT):
        for call, model in zip(calls, models, strict=True):
            assert_close(gradients(call, model, rows), gradients(model, model, rows))


def test_threads_train_and_score_at_once():
    models = [PlainLM(layers=1) for _ in range(2)]
    shared = PlainLM(layers=1)
    score = compiled(shared)
    batches = [batch_of(rows) for rows in (RIGHT, LEFT, BOTH)]  # here: threads share one generator

    def work(model):
        call, found = compiled(model), []
        for batch in batches:
            found.append(gradients_of(call, model, batch))
            with torch.no_grad():
                found.append(score(*batch.values())[0])
        return found

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(work, models))
    for model, found in zip(models, together, strict=True):
        for n, batch in enumerate(batches):
            assert_close(found[2 * n], gradients_of(model, model, batch))
            torch.testing.assert_close(found[2 * n + 1], shared(*batch.values())[0])


@pytest.mark.parametrize(
    "copied",
    [
        pytest.param(copy.deepcopy, marks=pytest.mark.slow),
        pytest.param(lambda model: pickle.loads(pickle.dumps(model)), id="pickled"),
    ],
)
def test_a_copy_of_a_compiled_module_trains_by_itself(copied):
    model = PlainLM(layers=1)
    model.compile(backend="packc", options=OPTIONS)
    want = gradients(model, model, RIGHT)
    other = copied(model)
    other.compile(backend="packc", options=OPTIONS)
    assert_close(gradients(other, other, RIGHT), want)
    with torch.no_grad():
        other.head.weight.zero_()
    assert_close(gradients(model, model, RIGHT), want)


def test_a_copy_of_what_torch_compile_returned_trains_by_itself():
    call = compiled(PlainLM(layers=1))
    want = gradients(call, call, RIGHT)
    other = copy.deepcopy(call)
    assert_close(gradients(other, other, LEFT), gradients(call, call, LEFT))
    with torch.no_grad():
        other.head.weight.zero_()
    assert_close(gradients(call, call, RIGHT), want)


def test_dynamo_may_be_reset_between_steps():
    model = PlainLM(layers=1)
    call = compiled(model)
    before = gradients(call, model, RIGHT)
    torch._dynamo.reset()
    steps = packc.stats()["steps"]
    assert_close(gradients(call, model, RIGHT), before)
    assert packc.stats()["steps"] == steps + 1


def test_with_dynamo_disabled_the_model_runs_as_it_is():
    model = PlainLM(layers=1)
    with torch._dynamo.config.patch(disable=True):
        assert_close(gradients(compiled(model), model, RIGHT), gradients(model, model, RIGHT))
        report = packc.explain(model)(*batch_of(RIGHT).values())
    assert "no graph" in report.fallback
