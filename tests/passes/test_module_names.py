"""Modules are named as the model names them, however the compiled function reaches them."""

import functools

import pytest
import torch
from torch import nn

from packc.passes import module_path


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.mixer = nn.Linear(4, 4)

    def forward(self, x):
        return self.mixer(x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer()])

    def forward(self, x):
        return self.layers[0](x)


def decorated(forward):
    @functools.wraps(forward)
    def wrapper(*args, **kwargs):
        return forward(*args, **kwargs)

    return wrapper


class Wrapped(Model):
    forward = decorated(Model.forward)


class Holder(nn.Module):
    def __init__(self, **models):
        super().__init__()
        for name, model in models.items():
            setattr(self, name, model)

    def forward(self, x):
        return sum(model(x) for model in self.children())


def names(function, *args):
    """The modules of the linear layers in a function's graph."""
    found = []

    def backend(gm, example_inputs):
        found.extend(module_path(n) for n in gm.graph.nodes if "linear" in str(n.target))
        return gm.forward

    torch.compile(function, backend=backend, fullgraph=True)(*args, torch.ones(2, 4))
    return found


def closure(*models):
    first, last = models[0], models[-1]
    return (lambda x: first(x)) if first is last else (lambda x: first(x) + last(x))


ONE = "layers.0.mixer"


@pytest.mark.parametrize(
    ("function", "args", "expected"),
    [
        (Model(), (), [ONE]),
        (Wrapped(), (), [ONE]),
        (torch.compile(Model()), (), [ONE]),
        (lambda model, x: model(x), (Model(),), [ONE]),
        (lambda *args: args[0](args[1]), (Wrapped(),), [ONE]),
        (closure(Model()), (), [ONE]),
        (Holder(a=torch.compile(Model()), module=Wrapped()), (), [f"a.{ONE}", f"module.{ONE}"]),
        (
            lambda tower_a, tower_b, x: tower_a(x) + tower_b(x),
            (Model(), Wrapped()),
            [f"tower_a.{ONE}", f"tower_b.{ONE}"],
        ),
        (closure(Model(), Wrapped()), (), [f"first.{ONE}", f"last.{ONE}"]),
        (
            lambda models, x: models[0](x) + models[1](x),
            ([Model(), Model()],),
            [f"models[0].{ONE}", f"models[1].{ONE}"],
        ),
    ],
    ids=[
        "model",
        "wrapped",
        "compiled",
        "argument",
        "args",
        "closure",
        "children",
        "two-arguments",
        "two-in-closure",
        "list",
    ],
)
def test_names_are_the_models_own(function, args, expected):
    assert names(function, *args) == expected


@pytest.mark.parametrize(
    ("stack", "expected"),
    [
        ([("L['self'].module.layers.0.mixer", Layer)], ONE),
        (
            [("L['self'].net", nn.parallel.DistributedDataParallel), ("L['self'].net.module.layers.0", Layer)],
            "net.layers.0",
        ),
        ([("L['self']._fsdp_wrapped_module.layers.0._checkpoint_wrapped_module.mixer", Layer)], ONE),
        ([("L['fn'].__closure__[0].cell_contents._modules['layers']._modules['0'].mixer", Layer)], ONE),
        ([("L['self'].heads['a-b'].out", Layer)], "heads.a-b.out"),
        ([("L['self']", Layer)], ""),
    ],
)
def test_wrappers_leave_no_trace(stack, expected):
    graph = torch.fx.Graph()
    node = graph.placeholder("x")
    node.meta["nn_module_stack"] = dict(enumerate(stack))
    assert module_path(node) == expected
