import pytest
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.value_ranges import ValueRanges

from packc.passes.unknown_sizes import unknown_size


def test_torch_need_not_guess_what_a_size_may_be_where_it_compares_costs(monkeypatch):
    pytest.importorskip("torch.fx.experimental._size_hinting", reason="torch 2.13 or newer guesses there")
    size = unknown_size(ShapeEnv(), 2)
    asked = []
    monkeypatch.setattr("torch.fx.experimental._size_hinting._sub_unbacked_exprs", lambda *x: asked.append(x))
    assert torch.fx.experimental.symbolic_shapes.optimization_hint(256 * size, fallback=1) == 256 * 8192
    assert not asked


def test_strides_are_products_of_sizes():
    env = ShapeEnv()
    size = unknown_size(env, 2)
    assert torch.sym_max(size, 1).node.expr == size.node.expr
    assert env.is_unbacked_symint(size.node.expr)


def test_what_is_supposed_of_a_size_is_not_relied_on():
    env = ShapeEnv()
    size = unknown_size(env, 2)
    assert env.bound_sympy(size.node.expr).lower == 2
    assert not env.bound_sympy(size.node.expr).issubset(ValueRanges(2, 8192))
    assert not env.guards
