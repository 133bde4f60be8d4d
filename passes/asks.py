"""What must hold for a reading to be exact on the pack: of a value, which the graph shows, or of each batch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx


@dataclass(frozen=True)
class ZeroAtPadding:
    """A value is summed over tokens: in the padded graph it must be zero at padding, or the graph is not packed."""

    value: fx.Node


@dataclass(frozen=True)
class HidesPadding:
    """An attention mask must hide padded keys from tokens, or the graph is not packed."""

    mask: fx.Node


@dataclass(frozen=True)
class HidesKeys:
    """An attention mask must hide padded keys from another sequence's queries, or the graph is not packed. Rows that
    have no key but padding stay whole: there, softmax gives every one of them a share. Of a mask that is added to
    scores there must be none: fused attention gives other gradients to such a row than the same written out."""

    mask: fx.Node


@dataclass(frozen=True)
class IgnoredLabels:
    """Every token left out must carry the label that the loss ignores; asked of each batch."""

    labels: fx.Node
    ignore_index: int


@dataclass(frozen=True)
class KeepLeft:
    """Left padding stays in the pack, for the op would notice that it is gone."""

    reason: str
    unless_zero: tuple[fx.Node, ...] = ()
    """Values that the op reads across tokens: if one is zero at padding in the padded graph, left padding may go."""


@dataclass(frozen=True)
class KeepRight:
    """Right padding stays in the pack."""

    reason: str
    unless_zero: tuple[fx.Node, ...] = ()
    """Values of which one that is zero at padding lets it go."""


@dataclass(frozen=True)
class OneDocument:
    """A row must hold no more than one document."""

    reason: str


Ask = ZeroAtPadding | HidesPadding | HidesKeys | IgnoredLabels | KeepLeft | KeepRight | OneDocument
