"""What packc has done in this process so far: ``packc.stats()``."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from packc.compilation import in_backward

if TYPE_CHECKING:
    from packc.batches import Packing

_lock = threading.Lock()
_sums: Counter[str] = Counter()
_whole_rows: Counter[str] = Counter()
_graphs: Counter[str | None] = Counter()
"""By why they are not packed; None: they are."""
_counts = contextvars.ContextVar("packc_counts", default=True)


def stats() -> dict[str, Any]:
    """What packc has done since it was imported, over all models and threads; for dashboards.

    Costs nothing on the device: the numbers are those that each batch is packed by. What :func:`packc.explain` runs is
    not counted, nor what a checkpoint computes again in a backward.

    Returns:
        A new dictionary of plain numbers:

        - ``"steps"``: calls of packed graphs. A model of several graphs (graph breaks, blocks that are compiled one by
          one) makes one for each.
        - ``"tokens"``: positions on which they worked, and ``"padded_tokens"``: B * L of the same batches; of all
          sequences, where a graph has several.
        - ``"whole_rows"``: reason -> rows that were not packed for it. A row with two reasons counts for both.
        - ``"graphs"``: ``"packed"``: how many were compiled packed, and ``"unpacked"``: reason -> graphs.
    """
    with _lock:
        return {
            **{name: _sums[name] for name in ("steps", "tokens", "padded_tokens")},
            "whole_rows": dict(_whole_rows),
            "graphs": {
                "packed": _graphs[None],
                "unpacked": {reason: count for reason, count in _graphs.items() if reason is not None},
            },
        }


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """What is compiled and called in this block, in this thread, leaves the totals as they are."""
    token = _counts.set(False)
    try:
        yield
    finally:
        _counts.reset(token)


def count_step(packings: Sequence[Packing]) -> None:
    """A call of a packed graph, of one sequence or of several."""
    if not _counts.get() or in_backward():
        return
    with _lock:
        _sums["steps"] += 1
        for packing in packings:
            _sums["tokens"] += packing.tokens
            _sums["padded_tokens"] += packing.padded_tokens
            for reason, rows in packing.reasons.items():
                _whole_rows[reason] += rows


def count_graph(reason: str | None) -> None:
    """A compiled graph; ``reason``: why it is not packed."""
    if _counts.get():
        with _lock:
            _graphs[reason] += 1
