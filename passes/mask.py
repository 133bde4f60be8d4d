"""Which input is the padding mask: ``(B, L)``, nonzero at real tokens."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from packc import config
from packc.passes.asks import HidesPadding
from packc.passes.axes import inputs_of, same_size
from packc.passes.graph import Graph
from packc.passes.sequences import read_by_mixers
from packc.passes.sources import argument_path, is_argument, is_called
from packc.passes.zeros import keeps_zero, zero_at_tokens

# In order of preference. "loss_mask", "token_type_mask", "mlm_mask" and the like say something else, and even of these
# only the first always says which positions are tokens: see confirm_mask.
_TRUSTED = "attention_mask"
_NAMES = (_TRUSTED, "input_mask", "padding_mask", "pad_mask", "conv_mask", "mask")
# Inputs that speak of tokens, but are not what a model makes them of.
_OF_TOKENS = {"position_ids", "seq_idx", "labels", "token_type_ids"}
_MOST_ROWS = 4
"""Inputs that are tried."""
_ADDS = {torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor}


class WrongMask(ValueError):
    """``packc.mask`` names something that is not a ``(B, L)`` input."""


class NoMask(Exception):
    """Nothing tells padding from tokens; the message says what was looked for."""

    for_documents: str | None = None
    """Why the graph is not packed without a mask either, for documents within its rows."""


def find_masks(graph: Graph) -> Graph:
    """Find the inputs that may be the padding mask.

    ``packc.config.mask`` is an argument's path in a call of the model, or the end of one (``attention_mask``,
    ``chosen.attention_mask``), or several, each of a sequence of its own. Without it, they are the inputs of two axes
    with a known name (``attention_mask``, ``padding_mask``, ``mask``, ...) that are not added to scores, and the rest
    is left to :func:`confirm_mask`.

    Raises:
        NoMask: there is none, or sequences have one position, and there is nothing along which to pack.
        WrongMask: ``packc.config.mask`` is set and does not name two-dimensional inputs of this graph.
    """
    arguments = [node for node in graph.placeholders if is_argument(node)]
    if config.mask is not None:
        return replace(graph, masks=_along_which_to_pack([_named(name, arguments) for name in _wanted()]))
    found = [node for node in arguments if node.meta["val"].ndim == 2 and _rank(node) and not _is_added(node)]
    if not found:
        raise NoMask(f"no (B, L) padding mask among the inputs {_paths(arguments)}")
    return replace(graph, masks=_along_which_to_pack(sorted(found, key=_rank)))


def _wanted() -> list[str]:
    """The names in ``packc.config.mask``."""
    given: str | list[str] = config.mask or []
    return given.split(",") if isinstance(given, str) else list(given)


def find_rows(graph: Graph) -> Graph:
    """Find the inputs that may be the tokens of a graph in which nothing marks padding: rows of ids, or of features.

    Raises:
        NoMask: there is none.
    """
    arguments = [node for node in graph.placeholders if is_argument(node)]
    rows = [node for node in arguments if node.meta["val"].ndim == (3 if _is_floating(node) else 2)]
    found = [node for node in rows if not same_size(node.meta["val"].shape[1], 1)]
    if not found:
        raise NoMask(f"no rows of tokens among the inputs {_paths(arguments)}")
    found.sort(key=lambda node: argument_path(node).split(".")[-1] in _OF_TOKENS)
    return replace(graph, masks=found[:_MOST_ROWS], padding=False)


def _is_floating(node: fx.Node) -> bool:
    return bool(node.meta["val"].is_floating_point())


def _along_which_to_pack(masks: list[fx.Node]) -> list[fx.Node]:
    for mask in masks:
        batch, length = mask.meta["val"].shape[:2]
        if same_size(length, 1):
            raise NoMask(f"the batch ({batch}, {length}) has one position per row")
    return masks


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


def confirm_mask(graph: Graph) -> Graph:
    """Refuse a mask that may be something else: only its use tells a padding mask from its opposite, or from the
    positions that count in a loss.

    Needs the zeros of :func:`packc.passes.zeros.zeros`. The names ``attention_mask`` and ``packc.config.mask`` are
    trusted, unless a mixer reads what they set to zero where they are one; so is one that attention is masked by.

    Raises:
        NoMask: no mixer reads a value that is zero wherever this mask is; or one reads the opposite.
    """
    if not graph.padding:
        return graph
    own, read = argument_path(graph.mask), read_by_mixers(graph)
    opposite = zero_at_tokens(graph, graph.mask) - graph.zero
    if any(value in opposite for value in read):
        raise NoMask(f"a mixer reads a value that is set to zero where {own!r} is one: it marks padding, not tokens")
    if own.split(".")[-1] == _TRUSTED or any(is_called(graph.mask, name) for name in _wanted()):
        return graph
    if any(value in graph.zero for value in read):
        return graph
    if any(graph.mask in inputs_of(ask.mask) for _, ask in graph.asks(HidesPadding)):
        return graph  # whether it does so is tried
    raise NoMask(
        f"no mixer reads a value that {own!r} sets to zero, so it may not be a padding mask; "
        f'if it is one, say so: options={{"packc.mask": {own!r}}}'
    )


def _is_added(node: fx.Node) -> bool:
    """A mask of zeros and minus infinities is added to scores: its zeros are the real tokens."""
    if not node.meta["val"].is_floating_point():
        return False
    seen, queue = set(), [node]
    while queue:
        node = queue.pop()
        for user in node.users:
            if user.target in _ADDS:
                return True
            if keeps_zero(user) and user.args[0] is node and user not in seen:
                seen.add(user)
                queue.append(user)
    return False
