"""Parallel over the sequence: a row is cut into segments of whole chunks that are walked at the same time.

Two walks, since what enters a segment is known only when those before it are done: that costs everything twice, so
there are only as many segments as the device needs to be busy.
"""

from __future__ import annotations

import torch
import triton


def segment_tokens(rows: int, tokens: int, blocks: int, chunk: int, device: torch.device, warps: int = 16) -> int:
    """Tokens of a segment, a multiple of ``chunk``, for programs of one warp over ``blocks`` blocks of channels.

    A processor is given ``warps`` of them.
    """
    chunks = triton.cdiv(max(tokens, 1), chunk)
    wanted = triton.cdiv(_processors(device) * warps, max(rows * blocks, 1))
    return triton.cdiv(chunks, min(wanted, chunks)) * chunk


def _processors(device: torch.device) -> int:
    # The interpreter is one.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
