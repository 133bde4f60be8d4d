"""Which input is the padding mask: ``(B, L)``, nonzero at real tokens."""

from __future__ import annotations

import torch
from torch import fx

from packc.passes.axes import same_size
from packc.passes.sources import argument_name, is_argument

# In order of preference. "loss_mask", "token_type_mask", "mlm_mask" and the like say something else.
_NAMES = ("attention_mask", "padding_mask", "pad_mask", "src_mask", "input_mask", "mask")
_MULTIPLIES = {torch.ops.aten.mul.Tensor, torch.ops.aten.mul_.Tensor}
_ADDS = {torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor}
_FORWARDS = {
    torch.ops.aten.to.dtype,
    torch.ops.aten.unsqueeze.default,
    torch.ops.aten.slice.Tensor,
    torch.ops.aten.alias.default,
    torch.ops.aten.view.default,
    torch.ops.aten.expand.default,
}


class NoMask(Exception):
    """Nothing tells padding from tokens; the message says what was looked for."""


def find_mask(gm: fx.GraphModule, *, name: str | None = None) -> fx.Node:
    """The placeholder that is the padding mask.

    Args:
        gm: a normalised graph.
        name: the argument's name in the model's ``forward``; None looks for a two-dimensional input with a known name
            (``attention_mask``, ``padding_mask``, ``mask``, ...) that is not added to scores.

    Raises:
        NoMask: there is none.
        ValueError: ``name`` was given and is not a two-dimensional input of this graph.
    """
    candidates = {argument_name(node): node for node in gm.graph.find_nodes(op="placeholder") if is_argument(node)}
    if name is not None:
        if name not in candidates:
            raise ValueError(f"packc.mask: the graph has no input {name!r}; it has {sorted(candidates)}")
        node = candidates[name]
        if node.meta["val"].ndim != 2:
            raise ValueError(f"packc.mask: {name!r} must be (B, L), got shape {tuple(node.meta['val'].shape)}")
        return node
    for known in _NAMES:
        node = candidates.get(known)
        if node is not None and node.meta["val"].ndim == 2 and not _is_added(node):
            return node
    raise NoMask(f"no (B, L) padding mask among the inputs {sorted(candidates)}")


def check_mask(mask: fx.Node) -> None:
    """Refuse sequences of one token: there is nothing along which to pack."""
    batch, length = mask.meta["val"].shape
    if same_size(length, 1):
        raise NoMask(f"the batch ({batch}, {length}) has one position per row")


def _is_added(node: fx.Node) -> bool:
    """A mask of zeros and minus infinities is added to scores: its zeros are the real tokens."""
    if not node.meta["val"].is_floating_point():
        return False
    seen, queue = set(), [node]
    while queue:
        for user in queue.pop().users:
            if user.target in _ADDS:
                return True
            if user.target in _FORWARDS and user not in seen:
                seen.add(user)
                queue.append(user)
    return False
