"""Document boundaries that a caller hands over: packc does not take them yet, and never passes over them in silence.

Collators that pack by themselves say where documents begin by ``position_ids`` that start again, by ``seq_idx`` or by
``cu_seq_lens_q``. Until these reach packc's ops, a row is one document, as it is to the stock model.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from packc.frontends import arguments_of_traced_call
from packc.passes import argument_path

POSITIONS = "position_ids"
_BY_NAME = ("seq_idx", "cu_seqlens", "cu_seq_lens", "cu_seq_lens_q", "cu_seq_lens_k")


def ignored_boundaries(gm: fx.GraphModule) -> str | None:
    """What to tell a caller who handed boundaries to the call that is being traced, of which its graph ``gm`` knows
    nothing; None if there is nothing to tell. What the graph reads, the model itself makes use of."""
    read = {argument_path(node).split(".")[-1] for node in gm.graph.find_nodes(op="placeholder")}
    given = arguments_of_traced_call(*_BY_NAME, POSITIONS)
    names = [name for name in _BY_NAME if given.get(name) is not None and name not in read]
    positions = given.get(POSITIONS)
    if POSITIONS not in read and isinstance(positions, Tensor) and bool(start_again(positions).any()):
        names.append(POSITIONS)
    return f"{' and '.join(names)}: {NOT_TAKEN}" if names else None


NOT_TAKEN = "packc takes no document boundaries from it yet, and each row is one document to its ops"


def positions_inputs(gm: fx.GraphModule) -> list[int]:
    """Which inputs of a Dynamo graph are ``position_ids``: one, or one of each sequence."""
    return [
        number
        for number, node in enumerate(gm.graph.find_nodes(op="placeholder"))
        if argument_path(node).split(".")[-1] == POSITIONS
        and isinstance(value := node.meta.get("example_value"), Tensor)
        and value.ndim
    ]


def start_again(positions: Tensor, real: Tensor | None = None) -> Tensor:
    """(B,) or (1,): whether positions of a row do not rise from one token to the next.

    Args:
        positions: ``(B, L)``, ``(1, L)`` or ``(L,)``; of ``(axes, B, L)``, several a token, the first axis counts.
            Others, coordinates of each token, say nothing of documents.
        real: ``(B, L)``, true at tokens; None: everywhere.
    """
    if positions.ndim > 2:
        step = positions[0].diff(dim=-1)
        falls = step < 0  # the patches of one image share a position
    else:
        falls = torch.atleast_2d(positions).diff(dim=-1) <= 0
    if real is not None and (falls.ndim != 2 or len(falls) not in (1, len(real))):
        return falls.new_zeros(1)
    if real is not None and real.shape[-1] == positions.shape[-1]:
        falls = falls & real[:, 1:] & real[:, :-1]
    return falls.any(-1)
