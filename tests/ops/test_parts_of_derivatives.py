"""Second derivatives of some inputs, through some gradients or results, in half precision, through checkpoints."""

import itertools
import warnings

import pytest
import torch
from differentiable_ops import OPS, scalar
from hypothesis import given, settings
from hypothesis import strategies as st
from selective_scan_data import relative_error
from torch.utils.checkpoint import checkpoint

of_every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
# How much may be lost, in units of the dtype's own rounding: results are rounded before the sine is taken of them.
HALVES = [torch.bfloat16, torch.float16]
UNITS = 16


def wide(tensors):
    return [x.double() for x in tensors]


def hessian(op, values, names):
    """In fp64, of :func:`scalar`: of every two inputs."""
    return torch.func.hessian(scalar(op, names), tuple(range(len(values))))(*wide(values))


def products(blocks, directions, rows):
    """The Hessian's ``rows`` times ``directions``, one an input or None."""
    return [
        sum(
            torch.tensordot(block, v.double(), v.ndim)
            for block, v in zip(blocks[row], directions, strict=True)
            if v is not None
        )
        for row in rows
    ]


@of_every_op
@pytest.mark.parametrize("dtype", HALVES)
def test_second_derivatives_in_half_precision(op, dtype):
    inputs = op.make()
    values, call = [x.to(dtype) for x in inputs.values()], scalar(op, inputs)
    directions = [torch.randn_like(x) for x in values]

    def first_and_second(values, directions):
        leaves = [x.clone().requires_grad_() for x in values]
        first = torch.autograd.grad(call(*leaves), leaves, create_graph=True)
        slope = sum((grad * v).double().sum() for grad, v in zip(first, directions, strict=True))
        return [*first, *torch.autograd.grad(slope, leaves)]

    results = first_and_second(values, directions)
    exact = first_and_second(wide(values), wide(directions))
    for name, result, expected in zip([*inputs, *inputs], results, exact, strict=True):
        assert result.dtype == dtype
        assert relative_error(result, expected) < UNITS * torch.finfo(dtype).eps, name


@of_every_op
@pytest.mark.parametrize("dtype", HALVES)
def test_forward_mode_in_half_precision(op, dtype):
    inputs = op.make()
    values = [x.to(dtype) for x in inputs.values()]
    directions = [torch.randn_like(x) for x in values]

    def call(*values):
        results = op.call(**dict(zip(inputs, values, strict=True)))
        return results if isinstance(results, tuple) else (results,)

    results = [x for both in torch.func.jvp(call, tuple(values), tuple(directions)) for x in both]
    exact = [x for both in torch.func.jvp(call, tuple(wide(values)), tuple(wide(directions))) for x in both]
    for result, like, expected in zip(results, call(*values) * 2, exact, strict=True):
        assert result.dtype == like.dtype
        assert relative_error(result, expected) < UNITS * torch.finfo(dtype).eps


def subsets(names):
    return st.sets(st.sampled_from(sorted(names)), min_size=1)


@pytest.mark.parametrize("name", ["selective_scan", "gated_delta_rule"])
def test_any_inputs_through_any_of_their_gradients(name):
    op = OPS[name]
    torch.manual_seed(0)
    inputs = op.make()
    names, values, call = list(inputs), list(inputs.values()), scalar(op, inputs)
    blocks = hessian(op, values, names)
    v = [torch.randn_like(x) for x in values]

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(subsets(names), subsets(names), subsets(names))
    def check(differentiable, through, wanted):
        leaves = {n: x.clone().requires_grad_(n in differentiable) for n, x in zip(names, values, strict=True)}
        needed = [n for n in names if n in differentiable]
        first = torch.autograd.grad(call(*leaves.values()), [leaves[n] for n in needed], create_graph=True)
        taken = [n for n in needed if n in through] or needed[:1]
        directions = {n: d for n, d in zip(names, v, strict=True) if n in taken}
        slope = sum((g * directions[n]).sum() for n, g in zip(needed, first, strict=True) if n in taken)
        asked = [n for n in needed if n in wanted] or needed[-1:]
        again = torch.autograd.grad(slope, [leaves[n] for n in asked], allow_unused=True)
        exact = products(blocks, [directions.get(n) for n in names], [names.index(n) for n in asked])
        for n, result, expected in zip(asked, again, exact, strict=True):
            # None is what autograd says of an input that nothing depends on.
            result = torch.zeros_like(expected) if result is None else result
            assert relative_error(result, expected) < 1e-5, (n, differentiable, taken)

    check()


@of_every_op
def test_one_result_alone(op):
    inputs = op.make()
    names, values = list(inputs), list(inputs.values())
    count = len(op.call(**inputs)) if isinstance(op.call(**inputs), tuple) else 1
    stranger = torch.ones(1, requires_grad=True)
    for position in range(count):

        def second(values, position=position):
            leaves = [x.clone().requires_grad_() for x in values]
            results = op.call(**dict(zip(names, leaves, strict=True)))
            result = results[position] if isinstance(results, tuple) else results
            first = torch.autograd.grad(result.sin().sum(), [*leaves, stranger], create_graph=True, allow_unused=True)
            assert first[-1] is None
            slope = sum(grad.cos().double().sum() for grad in first[:-1] if grad is not None)
            return torch.autograd.grad(slope, [*leaves, stranger], allow_unused=True)

        for name, result, expected in zip(names, second(values)[:-1], second(wide(values))[:-1], strict=True):
            assert (result is None) == (expected is None), name
            assert result is None or relative_error(result, expected) < 1e-5, name


@of_every_op
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_through_a_checkpoint(op, use_reentrant):
    inputs = op.make()
    names, values, call = list(inputs), list(inputs.values()), scalar(op, inputs)

    def gradients(run, create_graph):
        leaves = [x.clone().requires_grad_() for x in values]
        run(*leaves).backward(create_graph=create_graph)
        return leaves, [x.grad for x in leaves]

    _, first = gradients(lambda *x: checkpoint(call, *x, use_reentrant=use_reentrant), False)
    _, exact = gradients(call, False)
    assert all(itertools.starmap(torch.equal, zip(first, exact, strict=True)))
    if use_reentrant:
        return  # torch has no second derivatives through these
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*create_graph=True")
        both = [gradients(run, True) for run in (lambda *x: checkpoint(call, *x, use_reentrant=False), call)]
    again, exact = (torch.autograd.grad(sum(g.square().sum() for g in first), leaves) for leaves, first in both)
    for name, result, expected in zip(names, again, exact, strict=True):
        assert torch.equal(result, expected), name
