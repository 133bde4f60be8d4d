"""Batches of documents for packc: as many tokens as a budget allows, whatever lengths the documents have."""

from packc.data.carried import CarryingBatchSampler, Piece, Pieces, carried
from packc.data.collator import PackingCollator
from packc.data.sampler import PackingBatchSampler

__all__ = ["CarryingBatchSampler", "PackingBatchSampler", "PackingCollator", "Piece", "Pieces", "carried"]
