"""What torch notes about the compilation under way: its fake tensors, what is saved for backward, who cuts the graph.

The only file that takes these notes from torch, where they are private.
"""

import torch
from torch import fx

from packc.private_torch import private_torch

with private_torch():
    from torch._guards import TracingContext

    _backward_under_way = torch._C._current_graph_task_id

__all__ = ["TracingContext", "compilation_under_way", "ends_in_a_graph_break", "in_backward"]


def ends_in_a_graph_break(gm: fx.GraphModule) -> bool:
    """Whether the function goes on in another graph of Dynamo's, which may read anything of what this one returns."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    return bool(getattr(reason, "graph_break", False))


def compilation_under_way() -> TracingContext | None:
    return TracingContext.try_get()


def in_backward() -> bool:
    """Whether autograd is running a backward, in which a checkpoint calls its function again."""
    return _backward_under_way() != -1
