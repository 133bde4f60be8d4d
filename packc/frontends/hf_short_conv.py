"""The short causal convolution of transformers, which all its recurrent families share.

The function is channel-first, (B, D, L); packc's op is token-major, (B, L, D), and reads transposed views in place.
"""

from typing import Any

import torch

from packc import ops
from packc.frontends.hf import MODELING, heeded
from packc.frontends.keep_whole import KeptWhole


def causal_conv1d_fn(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if args or heeded(kwargs) or activation not in (None, "silu", "swish"):
        return NotImplemented
    out: Any = ops.causal_conv1d(hidden_states.transpose(1, 2), weight, bias, activation=activation)
    return out.transpose(1, 2)


KEPT_WHOLE: KeptWhole = {MODELING: {"causal_conv1d_fn": causal_conv1d_fn}}
