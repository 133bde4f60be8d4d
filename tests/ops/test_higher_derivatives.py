"""Derivatives of every op beyond the first, and in forward mode: right, or an error; never zeros.

fp64 inputs take the reference, so what the kernels do with fp32 ones is held against that.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from implementations import implementation
from mixers import MIXERS
from selective_scan_data import offsets, relative_error
from torch import Tensor

from packc import ops

LENGTHS = [3, 0, 4]
INDEX = torch.tensor([0, 1, 2, 5, 6, 8, 9])  # of 7 tokens among 2 rows of 5


class Op(NamedTuple):
    call: Callable[..., Tensor | tuple[Tensor, ...]]
    make: Callable[[], dict[str, Tensor]]


def _mixer(name: str) -> Op:
    mixer = MIXERS[name]
    options = {**mixer.options, "cu_seqlens": offsets(LENGTHS), "output_final_state": True}
    return Op(
        lambda **tensors: mixer.function(**tensors, **options),
        lambda: mixer.make(1, sum(LENGTHS)) | {"initial_state": torch.randn(len(LENGTHS), *mixer.state)},
    )


def _selective_scan() -> dict[str, Tensor]:
    L, D, N = sum(LENGTHS), 4, 3
    return {
        **{name: torch.randn(1, L, D) for name in ("u", "delta", "z")},
        **{name: torch.randn(1, L, 2, N) for name in ("B", "C")},
        "A": -torch.rand(D, N) - 0.1,
        "D": torch.randn(D),
        "delta_bias": torch.randn(D),
        "initial_state": torch.randn(len(LENGTHS), D, N),
    }


def _causal_conv1d() -> dict[str, Tensor]:
    D, W = 4, 3
    return {
        "x": torch.randn(1, sum(LENGTHS), D),
        "weight": torch.randn(D, W),
        "bias": torch.randn(D),
        "initial_state": torch.randn(len(LENGTHS), D, W - 1),
    }


def _of_documents(op: Callable, **options: object) -> Callable:
    return lambda **tensors: op(**tensors, cu_seqlens=offsets(LENGTHS), **options)


OPS = {
    **{name: _mixer(name) for name in MIXERS},
    "selective_scan": Op(
        _of_documents(ops.selective_scan, delta_softplus=True, output_final_state=True), _selective_scan
    ),
    "causal_conv1d": Op(_of_documents(ops.causal_conv1d, activation="silu", output_final_state=True), _causal_conv1d),
    "varlen_attention": Op(
        _of_documents(ops.varlen_attention, window=3),
        lambda: {"q": torch.randn(1, 7, 2, 3), "k": torch.randn(1, 7, 1, 3), "v": torch.randn(1, 7, 1, 4)},
    ),
    "pack": Op(lambda x: ops.pack(x, INDEX), lambda: {"x": torch.randn(2, 5, 3)}),
    "unpack": Op(lambda x: ops.unpack(x, INDEX, 2, 5), lambda: {"x": torch.randn(1, 7, 3)}),
}

of_every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


def wide(tensors):
    return [x.double() for x in tensors]


def scalar(op, names):
    """Of all results; nonlinear, so that linear ops have second derivatives too."""

    def call(*values):
        results = op.call(**dict(zip(names, values, strict=True)))
        results = results if isinstance(results, tuple) else (results,)
        return sum(torch.sin(y).double().sum() for y in results)

    return call


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
