"""What is said to be zero at padding is zero there, whatever the inputs are."""

import pytest
import torch
from harness import masks
from snippets import SNIPPETS, H
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from packc.passes.rules import zero_rule_for


def floats(arg):
    """Whether an argument is a tensor of real or complex numbers, or a list of them."""
    several = arg if isinstance(arg, (list, tuple)) and arg else [arg]
    return all(isinstance(each, torch.Tensor) and each.dtype.to_real().is_floating_point for each in several)


class Claims(fx.Interpreter):
    """Runs a graph; every op that claims to give zero is run again, on operands which are zero as it wants them."""

    def __init__(self, gm):
        super().__init__(gm)
        self.wrong, self.tried = [], set()

    def run_node(self, n):
        result = super().run_node(n)
        rule = zero_rule_for(n.target)
        if n.op != "call_function" or rule is None:
            return result
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        tensors = [i for i, arg in enumerate(args) if floats(arg)]
        for zeroed in ([i] for i in tensors), [tensors]:
            for chosen in zeroed:
                operands = [
                    pytree.tree_map(torch.zeros_like, arg) if i in chosen else arg for i, arg in enumerate(args)
                ]
                if rule(tuple(operands), lambda arg: isinstance(arg, torch.Tensor) and not arg.any()):
                    self.tried.add(n.target)
                    got = n.target(*operands, **kwargs)
                    if any(each.any() for each in (got if isinstance(got, (tuple, list)) else [got])):
                        self.wrong.append(f"{n.target} of zero operands {chosen}")
        return result


def claims(name):
    x, mask = torch.randn(H, H, H), masks(["1111"] * H)
    run = Claims(make_fx(SNIPPETS[name], pre_dispatch=True)(x, mask))
    run.run(x, mask)
    return run


@pytest.mark.parametrize("name", SNIPPETS)
def test_an_op_that_is_said_to_give_zero_gives_zero(name):
    assert claims(name).wrong == []


def test_no_zero_rule_is_untried():
    from packc.passes.rules.registry import _ZERO_RULES

    tried = set().union(*(claims(name).tried for name in SNIPPETS))
    assert set(_ZERO_RULES) - tried == set()
