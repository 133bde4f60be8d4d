"""A graph's backward may run again: what stock allows of ``retain_graph``, packc allows."""

import copy

import pytest
import torch
from harness import RIGHT, PlainLM, batch_of
from torch._inductor.utils import fresh_cache


def loss_twice(loss, logits, parameters):
    loss.backward(retain_graph=True)
    loss.backward()
    return [p.grad.clone() for p in parameters]


def two_losses_of_one_output(loss, logits, parameters):
    logits[0, :2].square().sum().backward(retain_graph=True)
    (2 * loss).backward()
    return [p.grad.clone() for p in parameters]


def parts_last_first(loss, logits, parameters):
    parts = [torch.autograd.grad(loss, [p], retain_graph=True)[0] for p in reversed(parameters)]
    return [*parts, *torch.autograd.grad(logits[:, 0].sum(), parameters[:2])]


def once(loss, logits, parameters):
    loss.backward()
    return [p.grad.clone() for p in parameters]


class WithoutMask(PlainLM):
    """Nothing in its graph says what is padding, so that it stays as it is."""

    def forward(self, ids, mask, labels):
        return super().forward(ids, torch.ones(ids.shape), labels)


def assert_all_allowed(kind=PlainLM, *, columns=(8,), dynamic=None, **options):
    """The first backward is an ordinary one: what is compiled for it serves the others."""
    model = kind(layers=1)
    exact = copy.deepcopy(model)
    options = {"packc.strict": kind is PlainLM, **{f"packc.{name}": value for name, value in options.items()}}
    fast = torch.compile(model, backend="packc", options=options, dynamic=dynamic)
    for length in columns:
        for second in (once, loss_twice, two_losses_of_one_output, parts_last_first):
            inputs = [each[:, :length] for each in batch_of(RIGHT).values()]
            actual, expected = [], []
            for module, call, results in ((model, fast, actual), (exact, exact, expected)):
                module.zero_grad()
                results += second(*call(*inputs), list(module.parameters()))
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [PlainLM, WithoutMask])
@pytest.mark.parametrize("dynamic", [None, True, False])
def test_without_code_generation_every_backward_may_run_again(kind, dynamic):
    assert_all_allowed(kind, columns=(8, 7, 6) if dynamic is None else (8,), dynamic=dynamic, inner="aot_eager")


@pytest.mark.parametrize(
    "dynamic", [None, pytest.param(True, marks=pytest.mark.slow), pytest.param(False, marks=pytest.mark.slow)]
)
def test_under_inductor_every_backward_may_run_again(dynamic):
    assert_all_allowed(dynamic=dynamic)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [True, False])
def test_under_inductor_the_backward_of_a_graph_left_unpacked_may_run_again(dynamic):
    with fresh_cache():
        # Stock's backward of the same graph donates, and lies in the cache.
        once(*torch.compile(WithoutMask(layers=1), dynamic=dynamic)(*batch_of(RIGHT).values()), [])
        torch._dynamo.reset()
        assert_all_allowed(WithoutMask, dynamic=dynamic)
