"""The functions below the public ops, called with tensors that are to be differentiated, say which op can be."""

import operator
import re

import pytest
import torch
from torch.autograd import forward_ad

import packc
from packc.ops import cpu_library

SOURCES = [source.read_text() for source in cpu_library.SOURCES.glob("*.cpp")]
NAMES = sorted(name for text in SOURCES if "FRAGMENT(packc_cpu," in text for name in re.findall(r'def\("(\w+)"', text))
LOADED = pytest.mark.skipif(any(cpu_library._load_all().values()), reason="needs a C++ compiler")
ROOTS = {"packc": packc, "torch": torch}


def arguments(name, first):
    """Such as the function's schema takes, the first being ``first``; it is not to run on them.
    Optional ones are None."""
    some = {"Tensor": torch.ones(2), "float": 1.0, "int": 1, "bool": False}
    schema = getattr(torch.ops.packc_cpu, name).default._schema
    return [first, *(some.get(str(each.type)) for each in schema.arguments[1:])]


def call(name, first):
    return getattr(torch.ops.packc_cpu, name)(*arguments(name, first))


@LOADED
@pytest.mark.parametrize("name", NAMES)
def test_a_derivative_is_refused_and_the_op_named_that_has_it(name):
    x = torch.ones(2)
    refusal = rf"packc_cpu::{name} has no derivative.*; call \S+, which has"
    with pytest.raises(NotImplementedError, match=refusal) as reverse:
        call(name, x.clone().requires_grad_())
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=refusal):
        call(name, forward_ad.make_dual(x, x))
    with pytest.raises(NotImplementedError, match=refusal):
        torch.func.vjp(lambda x: call(name, x), x)
    root, _, path = re.search(r"call (\S+),", str(reverse.value)).group(1).partition(".")
    assert callable(operator.attrgetter(path)(ROOTS[root]))


@LOADED
def test_without_a_derivative_it_runs():
    x = torch.randn(40, requires_grad=True)
    with torch.no_grad():
        torch.testing.assert_close(torch.ops.packc_cpu.silu(x), torch.nn.functional.silu(x))
    with forward_ad.dual_level():
        result = torch.ops.packc_cpu.silu(x.detach())
    torch.testing.assert_close(result, torch.nn.functional.silu(x.detach()))
    assert not result.requires_grad
