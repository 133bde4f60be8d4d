"""What torch notes about the compilation under way: its fake tensors, what is saved for backward, who cuts the graph.

The only file that takes these notes from torch, where they are private.
"""

from packc.private_torch import private_torch

with private_torch():
    from torch._guards import TracingContext

__all__ = ["TracingContext", "compilation_under_way"]


def compilation_under_way() -> TracingContext | None:
    return TracingContext.try_get()
