"""Derivatives of every op beyond the first, and in forward mode: right, or an error; never zeros.

fp64 inputs take the reference, so what the kernels do with fp32 ones is held against that.
"""

import pytest
import torch
from differentiable_ops import OPS, scalar
from implementations import implementation
from selective_scan_data import relative_error

of_every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


def wide(tensors):
    return [x.double() for x in tensors]


def hessian_vector_product(call, values, directions):
    leaves = [x.detach().requires_grad_() for x in values]
    grads = torch.autograd.grad(call(*leaves), leaves, create_graph=True)
    slope = sum((grad * v).sum() for grad, v in zip(grads, directions, strict=True))
    return torch.autograd.grad(slope, leaves)


@of_every_op
def test_gradgradcheck(op):
    inputs = op.make()
    leaves = [x.requires_grad_() for x in wide(inputs.values())]
    call = lambda *values: op.call(**dict(zip(inputs, values, strict=True)))  # noqa: E731
    options = {"fast_mode": True, "check_fwd_over_rev": True, "check_rev_over_rev": True}
    assert torch.autograd.gradgradcheck(call, leaves, **options)


@of_every_op
def test_gradcheck_in_forward_mode_and_of_batches(op):
    inputs = op.make()
    leaves = [x.requires_grad_() for x in wide(inputs.values())]
    call = lambda *values: op.call(**dict(zip(inputs, values, strict=True)))  # noqa: E731
    options = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True, **options)


@of_every_op
@pytest.mark.parametrize("kernels", ["reference", "cpu"])
def test_second_derivatives_of_kernels_agree_with_fp64(op, kernels):
    inputs = op.make()
    values, call = list(inputs.values()), scalar(op, inputs)
    directions = [torch.randn_like(x) for x in values]
    with implementation(kernels):
        results = hessian_vector_product(call, values, directions)
    expected = hessian_vector_product(call, wide(values), wide(directions))
    for name, result, exact in zip(inputs, results, expected, strict=True):
        assert relative_error(result, exact) < 1e-5, name


@of_every_op
def test_torch_func_agrees_with_autograd(op):
    inputs = op.make()
    values, call = list(inputs.values()), scalar(op, inputs)
    directions = [torch.randn_like(x) for x in values]
    everything = tuple(range(len(values)))
    expected = hessian_vector_product(call, wide(values), wide(directions))
    grad = torch.func.grad(call, everything)
    transformed = {
        "forward over reverse": lambda: torch.func.jvp(grad, tuple(values), tuple(directions))[1],
        "reverse over reverse": lambda: torch.func.vjp(grad, *values)[1](tuple(directions)),
    }
    for name, transform in transformed.items():
        for result, exact in zip(transform(), expected, strict=True):
            assert relative_error(result, exact) < 1e-5, name


@of_every_op
def test_vmap(op):
    inputs = op.make()
    names, values = list(inputs), [torch.stack([x, torch.randn_like(x) * 0.1 + x]) for x in inputs.values()]
    grad = torch.func.grad(scalar(op, names), tuple(range(len(names))))
    first, second = (grad(*(x[n] for x in values)) for n in (0, 1))
    for result, *alone in zip(torch.func.vmap(grad)(*values), first, second, strict=True):
        assert relative_error(result, torch.stack(alone)) < 1e-6


@of_every_op
def test_jacobians(op):
    inputs = op.make()
    (first, *rest), call = wide(inputs.values()), scalar(op, inputs)
    leaf = first.requires_grad_()
    expected = torch.autograd.functional.hessian(lambda x: call(x, *rest), leaf)
    hessian = torch.func.hessian(call)(first.detach(), *rest)
    assert relative_error(hessian, expected) < 1e-10
    hessian = torch.func.jacrev(torch.func.jacrev(call))(first.detach(), *rest)
    assert relative_error(hessian, expected) < 1e-10
    hessian = torch.autograd.functional.hessian(lambda x: call(x, *rest), leaf, vectorize=True)
    assert relative_error(hessian, expected) < 1e-10


@of_every_op
def test_third_derivatives(op):
    inputs = op.make()
    values, call = list(inputs.values()), scalar(op, inputs)
    v = [torch.randn_like(x) for x in values]

    def second_slope(values):
        leaves = [x.detach().requires_grad_() for x in values]
        result = call(*leaves)
        for _ in range(2):
            grads = torch.autograd.grad(result, leaves, create_graph=True)
            result = sum((grad * d).sum() for grad, d in zip(grads, v, strict=True))
        return result, torch.autograd.grad(result, leaves)

    third = sum((grad * d).sum() for grad, d in zip(second_slope(values)[1], v, strict=True))
    eps = 1e-5
    above, below = (
        second_slope([x + sign * eps * d for x, d in zip(wide(values), wide(v), strict=True)])[0] for sign in (1, -1)
    )
    assert third.item() == pytest.approx((above - below).item() / (2 * eps), rel=1e-4)
