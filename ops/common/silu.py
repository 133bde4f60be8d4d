"""SiLU, the gate of Mamba's layers."""

import torch
from torch import Tensor


def silu_slope(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))
