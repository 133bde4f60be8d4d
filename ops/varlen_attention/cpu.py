"""The C++ kernels of ``csrc/varlen_attention.cpp``."""

from typing import Any

import torch
from torch import Tensor


def varlen_attention(*args: Any) -> tuple[Tensor, Tensor]:
    return torch.ops.packc_cpu.varlen_attention.default(*args)


def varlen_attention_bwd(*args: Any) -> tuple[Tensor, ...]:
    return torch.ops.packc_cpu.varlen_attention_bwd.default(*args)


def attention_spans(*args: Any) -> tuple[Tensor, Tensor]:
    return torch.ops.packc_cpu.attention_spans.default(*args)


def attention_spans_bwd(*args: Any) -> tuple[Tensor, ...]:
    return torch.ops.packc_cpu.attention_spans_bwd.default(*args)
