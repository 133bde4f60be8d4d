"""Whether a compiled model is called with shapes only, as estimators of FLOPs and memory call it."""

from torch import Tensor

from packc.private_torch import private_torch

with private_torch():
    from torch._guards import active_fake_mode
    from torch._subclasses import FakeTensor


def has_values(x: Tensor) -> bool:
    """False for fake and meta tensors, and for all under an ambient fake mode: there is nothing to read."""
    return active_fake_mode() is None and not isinstance(x, FakeTensor) and not x.is_meta
