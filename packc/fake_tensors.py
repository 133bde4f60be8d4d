"""Tensors that have a shape and no values: what graphs are traced on, and what estimators of FLOPs and memory pass.

The only file that takes fake tensors from torch, where they are private; others take them from here.
"""

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from packc.private_torch import private_torch

with private_torch():
    _modes_under_way = torch._C._len_torch_dispatch_stack
    from torch._dispatch.python import enable_python_dispatcher
    from torch._guards import active_fake_mode, detect_fake_mode
    from torch._subclasses import FakeTensor, FakeTensorMode

__all__ = ["FakeTensor", "FakeTensorMode", "detect_fake_mode", "enable_python_dispatcher", "fake_mode_of", "has_values"]


def has_values(x: Tensor) -> bool:
    """False for fake and meta tensors, and for all under an ambient fake mode: there is nothing to read."""
    real = not isinstance(x, FakeTensor) and not x.is_meta
    return real and (_modes_under_way() == 0 or active_fake_mode() is None)


def fake_mode_of(x: Tensor) -> AbstractContextManager[object] | None:
    """The mode that a fake tensor belongs to; None for others."""
    return x.fake_mode if isinstance(x, FakeTensor) else None
