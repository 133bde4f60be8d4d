"""Derivatives that are taken inside of a compiled function are those that eager takes, whatever compiles it."""

import pytest
import torch
from differentiable_ops import OPS, PADDED, scalar
from implementations import implementation
from selective_scan_data import relative_error
from torch.autograd import forward_ad

import packc

CASES = {**{f"{name}, rows": op for name, op in PADDED.items()}, **OPS}
every_case = pytest.mark.parametrize(
    "op",
    [
        pytest.param(op, id=name, marks=() if name == "causal_conv1d, rows" else pytest.mark.slow)
        for name, op in CASES.items()
    ],
)
every_backend = pytest.mark.parametrize(
    "how",
    [
        pytest.param({"backend": "eager"}, id="eager"),
        pytest.param({"backend": "aot_eager"}, id="aot_eager", marks=pytest.mark.slow),
        pytest.param({"backend": packc.backend, "options": {"packc.inner": "aot_eager"}}, id="packc"),
        pytest.param({"backend": packc.backend}, id="packc, inductor", marks=pytest.mark.slow),
    ],
)


def jvp(f):
    return lambda x, v: torch.func.jvp(f, (x,), (v,))[1]


def dual_level(f):
    def tangent(x, v):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent

    return tangent


def grad(f):
    return lambda x, v: torch.func.grad(f)(x)


def vjp(f):
    return lambda x, v: torch.func.vjp(f, x)[1](torch.ones(()).double())[0]


def jacrev(f):
    return lambda x, v: torch.func.jacrev(f)(x)


def vmap(f):
    return lambda x, v: torch.func.vmap(f)(torch.stack([x, x + 0.1 * v]))


def second(f):
    return lambda x, v: torch.func.grad(lambda x: (torch.func.grad(f)(x) * v).sum())(x)


every_transform = pytest.mark.parametrize(
    "transform",
    [jvp, dual_level, second, *(pytest.param(f, marks=pytest.mark.slow) for f in (grad, vjp, jacrev, vmap))],
)


@every_backend
@every_transform
@every_case
def test_transforms_agree_with_eager(op, transform, how):
    inputs = op.make()
    (x, *rest), call = inputs.values(), scalar(op, inputs)
    # The sum has a tangent even where the op's is lost.
    function = lambda x: call(x, *rest) + x.double().square().sum()  # noqa: E731
    v = torch.randn_like(x)
    expected = transform(function)(x, v)
    result = torch.compile(transform(function), **how)(x, v)
    assert relative_error(result, expected) < 1e-5


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_kernels_behind_a_graph_break_are_not_compiled(kernels, mode):
    compiled = []

    def backend(gm, inputs):
        compiled.extend(node.target for node in gm.graph.nodes if node.op.startswith("call"))
        return gm

    scan = torch.compiler.disable(torch.ops.packc.linear_scan.default, recursive=False)

    @torch.compile(backend=backend)
    def function(a, b):
        return scan(a.neg(), b, None, None, False)[0].abs()

    a, b = torch.rand(1, 4, 3), torch.randn(1, 4, 3)
    with implementation(kernels), mode():
        result = function(a.requires_grad_(), b)
        if result.requires_grad:
            result.sum().backward()
    assert compiled == ["neg", "abs"]
