"""From which tokens see which, by example, to what ``varlen_attention`` calls it."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, fx
from torch.nn import functional as F


@dataclass(frozen=True)
class Band:
    """A token sees its document; with ``window`` what is nearer, and with ``causal`` no later token."""

    causal: bool
    window: int | None = None
    apart: bool = False
    """Whether positions that start again begin a document: otherwise a row is one, whatever they are."""

    def shows(self, distance: int) -> bool:
        """Whether a token sees one that is so many positions before it."""
        near = self.window is None or (self.window > 0 and abs(distance) < self.window)
        return near and not (self.causal and distance < 0)


class Other(enum.Enum):
    """What :func:`packc.ops.varlen_attention` has no arguments for."""

    TOKENS = "some tokens and no padding"


class Chunks(NamedTuple):
    """A token sees those before it in its chunk: each document is cut into chunks of so many tokens."""

    size: int

    def show(self, tokens: Tensor) -> Tensor:
        """(B, L), true at tokens, of one document a row -> (B, L, L), true where a query sees a key."""
        place = torch.arange(tokens.shape[1])
        chunk = (place - tokens.long().argmax(1, keepdim=True)) // self.size
        same = chunk[:, :, None] == chunk[:, None, :]
        return same & (place[:, None] >= place) & tokens[:, :, None] & tokens[:, None, :]


Seen = Band | Chunks | Other


def visible(mask: Tensor) -> Tensor:
    """What an attention mask shows: true, or not far below zero where it is added to scores."""
    return mask if mask.dtype == torch.bool else mask > max(torch.finfo(mask.dtype).min / 2, -1e8)


@dataclass
class Pairs:
    """Pairs of tokens, by how many positions the key is behind the query."""

    seen: set[int] = field(default_factory=set)
    hidden: set[int] = field(default_factory=set)
    seen_across: set[int] = field(default_factory=set)
    """Of different documents in a row, by their positions."""
    hidden_across: set[int] = field(default_factory=set)
    exact: bool = True
    """Whether nothing else is added to the score of a pair that is seen."""

    def add(self, mask: Tensor, real: Tensor, documents: Tensor | None = None, biases: Tensor | float = 0.0) -> bool:
        """Note what tokens see through an attention mask; False if one of them sees padding.

        One that sees nothing through a mask that is added to scores sees everything, padding included: softmax gives
        each key a share.

        Args:
            mask: (B or 1, heads or 1, L or 1, L), bool, or floating and added to scores.
            real: (B, L), bool: at tokens.
            documents: (B, L), a number for each; None: one a row.
            biases: what is to be added to the scores of pairs that are seen.
        """
        shown = visible(mask)
        queries, keys = real[:, None, :, None], real[:, None, None, :]
        if bool((shown & (queries & ~keys)).any()):
            return False
        tokens = queries & keys
        seen = shown & tokens
        if mask.dtype != torch.bool:
            if bool((real[:, None] & ~seen.any(3)).any()):
                return False
            self.exact &= not bool((seen & (mask != biases)).any())
        documents = torch.zeros_like(real) if documents is None else documents
        same = (documents[:, :, None] == documents[:, None, :])[:, None]
        self.seen |= _distances(seen & same)
        self.hidden |= _distances(tokens & ~shown & same)
        self.seen_across |= _distances(seen & ~same)
        self.hidden_across |= _distances(tokens & ~shown & ~same)
        return True

    def band(self) -> Seen:
        behind = [distance for distance in self.hidden if distance >= 0]
        band = Band(causal=not any(distance < 0 for distance in self.seen), window=min(behind, default=None))
        as_said = all(map(band.shows, self.seen)) and not any(map(band.shows, self.hidden))
        if any(map(band.shows, self.hidden_across)):
            band, as_said = replace(band, apart=True), as_said and not self.seen_across
        else:
            as_said &= all(map(band.shows, self.seen_across))
        return band if self.exact and as_said else Other.TOKENS


class Biased(NamedTuple):
    """What is added to scores: nothing but biases of each query, by how many tokens before it a key is."""

    band: Band
    """Of the pairs to which it is added; the others are hidden."""
    biases: fx.Node
    """``(B, heads, L, R)`` or ``(B, L, heads, R)``, of which keys as far back as R, and those behind, have none."""


def by_distance(biases: Tensor) -> Tensor:
    """``(B, heads, L, R)`` as it is added to scores ``(B, heads, L, L)``."""
    length, R = biases.shape[2:]
    place = torch.arange(length)
    back = place[:, None] - place
    added = biases.gather(-1, back.clamp(0, R - 1).expand(*biases.shape[:2], -1, -1))
    return added.masked_fill((back < 0) | (back >= R), 0)


def _distances(pairs: Tensor) -> set[int]:
    """Of the pairs (B, heads, L, L) that are true: query minus key."""
    some = pairs.flatten(0, 1).any(0)
    length = some.shape[0]
    # Each row one to the right of the row above: one distance a column.
    skewed = F.pad(some.flip(1), (0, length)).flatten()[: length * (2 * length - 1)].view(length, 2 * length - 1)
    return set((skewed.any(0).nonzero()[:, 0] - (length - 1)).tolist())
