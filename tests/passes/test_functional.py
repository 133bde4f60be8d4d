"""What is written in place reads as it did, before the write and after it, through every view."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from packc.passes import Graph, functional

X = torch.arange(24.0).view(2, 3, 4)


def a_view_taken_before(x):
    y = x * 2
    view = y[..., 1]
    before = view + 1
    y[..., :2] = -1
    return before, view + 1, y


def a_write_to_the_whole(x):
    y = x * 2
    view = y.transpose(0, 1)[1]
    y.add_(1)
    return view * 2


def writes_that_overlap(x):
    y = x * 2
    first, second = y[..., :3], y[..., 2:]
    first.mul_(10)
    second.add_(first[..., :2])
    return y + first.sum()


def a_view_of_a_view(x):
    y = x * 2
    row = y[1]
    corner = row[1:, 2:]
    row[2] = 7
    corner.neg_()
    return y, row.sum(), corner


def another_dtype_and_fewer_axes(x):
    y = x * 2
    y[..., 1:3] = torch.arange(2)
    y[:, 1] = x.double()[0, 0]
    return y


def the_result_of_a_write(x):
    y = x * 2
    return y[0].fill_(3).add_(1) + y[1]


def a_loop(x):
    y = torch.zeros_like(x)
    for t in range(x.shape[1]):
        y[:, t] = x[:, t] + (y[:, t - 1] if t else 0)
    return y


def of_several_results(x):
    values, indices = x.max(-1)
    values[:, 0] = 0
    return values, indices


def of_one_value_broadcast(x):
    y = x * 2
    y[..., :] = x[..., :1]
    return y


WRITES = [
    a_view_taken_before,
    a_write_to_the_whole,
    writes_that_overlap,
    a_view_of_a_view,
    another_dtype_and_fewer_axes,
    the_result_of_a_write,
    a_loop,
    of_several_results,
    of_one_value_broadcast,
]


def to_an_input(x):
    x[0] = 1
    return x * 2


def through_a_reshape(x):
    y = x * 2
    y.view(-1)[3:] = 1
    return y


def read_through_a_part_of_a_split(x):
    y = x * 2
    part, _ = y.split(2, -1)
    y[..., 0] = 1
    return part + 1


def traced(function):
    gm = make_fx(function, tracing_mode="fake", pre_dispatch=True)(X)
    for node in gm.graph.nodes:
        node.meta.setdefault("val", None)
    return functional(Graph(gm, [])).gm


def writes(gm):
    return [
        node
        for node in gm.graph.nodes
        if node.op == "call_function" and getattr(node.target, "_schema", None)
        if node.target._schema.is_mutable
    ]


@pytest.mark.parametrize("function", WRITES, ids=lambda function: function.__name__)
def test_nothing_is_written_in_place_and_all_is_read_as_before(function):
    gm = traced(function)
    assert not writes(gm)
    torch.testing.assert_close(gm(X.clone()), function(X.clone()), check_stride=True)
    x = X.clone().requires_grad_()
    gradients = []
    for each in (function, gm):
        out = each(x)
        out = out if isinstance(out, torch.Tensor) else out[0]
        gradients.append(torch.autograd.grad(out.sum(), x))
    torch.testing.assert_close(gradients[1], gradients[0])


def test_a_write_that_no_gradient_follows_stays_as_it_was():
    def function(x):
        y = x * 2
        with torch.no_grad():
            y[0] = 5
        return y**2

    gm, x = traced(function), X.clone().requires_grad_()
    gradients = [torch.autograd.grad(each(x).sum(), x)[0] for each in (function, gm)]
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("function", [to_an_input, through_a_reshape, read_through_a_part_of_a_split])
def test_what_cannot_be_followed_stays_as_it_was(function):
    gm = traced(function)
    assert writes(gm)
    torch.testing.assert_close(gm(X.clone()), function(X.clone()), check_stride=True)
