"""A program as the graph that Dynamo would hand over, without it: placeholders, one call, fakes with its symbols."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor, fx, nn
from torch._dynamo.source import ConstantSource
from torch._guards import GuardSource
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fuzz.batches import make_inputs
from fuzz.program import Program


def traced(program: Program) -> tuple[fx.GraphModule, list[Any], ShapeEnv | None]:
    """A graph for :func:`packc.compiler.pack_graph`, fakes of its inputs, and where guards on sizes are kept."""
    shape_env = ShapeEnv() if program.symbolic else None
    mode = FakeTensorMode(shape_env=shape_env, allow_non_fake_inputs=True)
    example = make_inputs(program.inputs, program.sizes, "right", 0)
    graph, fakes, nodes = fx.Graph(), [], []
    for each in program.inputs:
        node = graph.placeholder(each.name)
        dynamic = [axis.size in program.symbolic and axis.size in ("B", "L") for axis in each.axes]
        fakes.append(_fake(mode, example[each.name], each.name, dynamic))
        kind = nn.Parameter if each.kind == "parameter" else Tensor.detach
        node.meta["example_value"] = kind(example[each.name])
        if each.kind == "buffer":
            node._dynamo_source = SimpleNamespace(
                local_name=each.name, guard_source=GuardSource.LOCAL_UNSPECIALIZED_NN_MODULE
            )
        nodes.append(node)
    graph.output(graph.call_function(program.function(), tuple(nodes)))
    return fx.GraphModule(nn.Module(), graph), fakes, shape_env


def _fake(mode: FakeTensorMode, x: Tensor, name: str, dynamic: list[bool]) -> Tensor:
    if mode.shape_env is None:
        return mode.from_tensor(x, static_shapes=True)
    sizes = [DimDynamic.DYNAMIC if each else DimDynamic.STATIC for each in dynamic]
    context = StatelessSymbolicContext(dynamic_sizes=sizes)
    return mode.from_tensor(x, symbolic_context=context, source=ConstantSource(name))


def serves(shape_env: ShapeEnv | None, fakes: list[Any], inputs: list[Tensor]) -> bool:
    """Whether the graph is for inputs of these sizes: no guard that was made while it was traced fails."""
    values: dict[Any, int] = {}
    for fake, real in zip(fakes, inputs, strict=True):
        for symbol, size in zip(fake.shape, real.shape, strict=True):
            if isinstance(symbol, int):
                if symbol != size:
                    return False
            elif values.setdefault(symbol.node._expr, size) != size:
                return False
    if shape_env is None:
        return True
    replaced = [(symbol, shape_env.replacements.get(symbol, symbol)) for symbol in values]
    ranges = all(
        size in shape_env.var_to_range[symbol] for symbol, size in values.items() if symbol in shape_env.var_to_range
    )
    same = all(expression.subs(values) == values[symbol] for symbol, expression in replaced)
    return ranges and same and all(guard.expr.subs(values) == True for guard in shape_env.guards)  # noqa: E712
