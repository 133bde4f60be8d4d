"""Padding of a batch that is not packed, where positions are no boundaries though they do not rise.

``generate`` hands over positions that are 0 at left padding. The mask beside them is the batch's ``(B, S)``, which in a
later part of a prompt has more places than the part, or what attention is masked by, ``(B, ., L, S)``.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from packc.passes import argument_path


def mask_input(gm: fx.GraphModule) -> int | None:
    """Which input of a Dynamo graph is ``attention_mask``, or the first of several by kinds of layers."""
    for number, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        value = node.meta.get("example_value")
        if "attention_mask" in argument_path(node).split(".") and isinstance(value, Tensor) and value.ndim in (2, 4):
            return number
    return None


def tokens_by(mask: Tensor, length: int) -> Tensor | None:
    """``(B, L)``, true where not padding: for one of ``(B, ., L, S)``, which sees nothing. None if it does not fit."""
    if mask.ndim == 2:
        return mask[:, -length:] != 0 if mask.shape[1] >= length else None
    if mask.shape[2] != length:
        return None
    if mask.is_floating_point():  # added to scores
        mask = mask > torch.finfo(mask.dtype).min
    return (mask != 0).any(-1).any(1)
