"""The document of every token of a packed row, so that kernels compare two integers instead of searching."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from packc.ops import documents
from packc.ops.tritonsrc.launch import launch

_BLOCK = 256


@triton.jit(do_not_specialize=["tokens", "documents"])
def _document_of_token(cu_seqlens, out, tokens, documents, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # The last document that begins at or before the token: empty ones before it begin there too.
    low = tl.zeros([BLOCK], tl.int32)
    high = tl.zeros([BLOCK], tl.int32) + documents
    for _ in tl.range(STEPS):
        middle = (low + high) // 2
        begins = tl.load(cu_seqlens + middle) <= token
        low = tl.where(begins, middle, low)
        high = tl.where(begins, high, middle)
    tl.store(out + token, low, mask=token < tokens)


def document_of_token(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """int32 ``(tokens,)`` for offsets ``(documents + 1,)``; once a batch."""
    found: Tensor = documents.once(cu_seqlens, ("document of token", tokens), lambda: _found(cu_seqlens, tokens))
    return found


def _found(cu_seqlens: Tensor, tokens: int) -> Tensor:
    if cu_seqlens.device.type == "cpu":
        documents.check_offsets(cu_seqlens.long(), tokens)
    count = cu_seqlens.shape[0] - 1
    out = torch.empty(tokens, dtype=torch.int32, device=cu_seqlens.device)
    launch(
        _document_of_token,
        (triton.cdiv(tokens, _BLOCK),),
        cu_seqlens=cu_seqlens.contiguous(),
        out=out,
        tokens=tokens,
        documents=count,
        # A power of two of steps, so that few kernels are compiled; steps too many change nothing.
        STEPS=triton.next_power_of_2(max(1, count.bit_length())),
        BLOCK=_BLOCK,
    )
    return out
