"""Which input is the padding mask: ``(B, L)``, nonzero at real tokens."""

from __future__ import annotations

import torch
from torch import fx

from packc.passes.axes import same_size
from packc.passes.padding import zero_at_tokens
from packc.passes.sources import argument_path, is_argument, is_called

# In order of preference. "loss_mask", "token_type_mask", "mlm_mask" and the like say something else, and even of these
# only the first always says which positions are tokens: see confirm_mask.
_TRUSTED = "attention_mask"
_NAMES = (_TRUSTED, "input_mask", "padding_mask", "pad_mask", "mask")
_ADDS = {torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor}
_FORWARDS = {
    torch.ops.aten.to.dtype,
    torch.ops.aten.unsqueeze.default,
    torch.ops.aten.slice.Tensor,
    torch.ops.aten.alias.default,
    torch.ops.aten.view.default,
    torch.ops.aten.expand.default,
}


class WrongMask(ValueError):
    """``packc.mask`` names something that is not a ``(B, L)`` input."""


class NoMask(Exception):
    """Nothing tells padding from tokens; the message says what was looked for."""


def find_masks(gm: fx.GraphModule, *, name: str | None = None) -> list[fx.Node]:
    """The placeholders that may be the padding mask, the likeliest first.

    Args:
        gm: a normalised graph.
        name: the argument's path in a call of the model, or the end of one (``attention_mask``,
            ``chosen.attention_mask``); None looks for two-dimensional inputs with a known name (``attention_mask``,
            ``padding_mask``, ``mask``, ...) that are not added to scores, and leaves the rest to :func:`confirm_mask`.

    Raises:
        NoMask: there is none.
        WrongMask: ``name`` was given and is not one two-dimensional input of this graph.
    """
    arguments = [node for node in gm.graph.find_nodes(op="placeholder") if is_argument(node)]
    if name is not None:
        return [_named(name, arguments)]
    found = [node for node in arguments if node.meta["val"].ndim == 2 and _rank(node) and not _is_added(node)]
    if not found:
        raise NoMask(f"no (B, L) padding mask among the inputs {_paths(arguments)}")
    return sorted(found, key=_rank)


def _named(name: str, arguments: list[fx.Node]) -> fx.Node:
    found = [node for node in arguments if is_called(node, name)]
    if not found:
        raise WrongMask(f"packc.mask: the graph has no input {name!r}; it has {_paths(arguments)}")
    if len(found) > 1:
        raise WrongMask(f"packc.mask: {name!r} may be any of {_paths(found)}; write the whole path of one")
    if found[0].meta["val"].ndim != 2:
        raise WrongMask(f"packc.mask: {name!r} must be (B, L), got shape {tuple(found[0].meta['val'].shape)}")
    return found[0]


def _paths(nodes: list[fx.Node]) -> list[str]:
    return sorted(map(argument_path, nodes))


def _rank(node: fx.Node) -> int:
    """Place in the order of preference, from one; zero for a name that says nothing of padding."""
    name = argument_path(node).split(".")[-1]
    if name in _NAMES:
        return 1 + _NAMES.index(name)
    return 1 + len(_NAMES) if name.endswith(f"_{_TRUSTED}") else 0


def check_mask(mask: fx.Node) -> None:
    """Refuse sequences of one token: there is nothing along which to pack."""
    batch, length = mask.meta["val"].shape
    if same_size(length, 1):
        raise NoMask(f"the batch ({batch}, {length}) has one position per row")


def confirm_mask(gm: fx.GraphModule, mask: fx.Node, *, zero: set[fx.Node], name: str | None = None) -> None:
    """Refuse a mask that may be something else: only its use tells a padding mask from its opposite, or from the
    positions that count in a loss.

    Needs the layouts of :func:`packc.passes.layout.layout`. The names ``attention_mask`` and ``name`` are trusted,
    unless a mixer reads what they set to zero where they are one.

    Raises:
        NoMask: no mixer reads a value of ``zero``, the values that are zero wherever this mask is; or one reads the
            opposite.
    """
    own = argument_path(mask)
    opposite = zero_at_tokens(gm, mask) - zero
    if any(value in opposite for value in _read_by_mixers(gm)):
        raise NoMask(f"a mixer reads a value that is set to zero where {own!r} is one: it marks padding, not tokens")
    if own.split(".")[-1] == _TRUSTED or (name is not None and is_called(mask, name)):
        return
    if any(value in zero for value in _read_by_mixers(gm)):
        return
    raise NoMask(
        f"no mixer reads a value that {own!r} sets to zero, so it may not be a padding mask; "
        f'if it is one, say so: options={{"packc.mask": {own!r}}}'
    )


def _read_by_mixers(gm: fx.GraphModule) -> list[fx.Node]:
    forms = (node.meta.get("packed_form") for node in gm.graph.nodes)
    return [form.keep_left_unless_zero[0] for form in forms if form is not None and form.keep_left_unless_zero]


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
