"""Gathering rows on a GPU. Bits are copied: every element counts as an integer of its size.

Scattering is gathering by the inverse index, minus one where no token goes: so every element of the result is written
once, be it a zero, where clearing it first would write it twice. The inverse is a row's size smaller than the result.
"""

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from packc.ops.tritonsrc.launch import launch

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BYTES = 8192  # of a program
_BLOCK = 256


def supports(x: Tensor) -> bool:
    return x.element_size() in _INTEGERS


@triton.jit(do_not_specialize=["T", "L", "tokens"], do_not_specialize_on_alignment=["x_e"])
def _gather(
    x, places, out, T, L, tokens, E, x_b, x_t, x_e, FLAT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr
):
    """``out[t] = x[places[t]]`` of ``tokens`` tokens in rows of L, zero for a place that is none of them."""
    blocks = tl.cdiv(E, BLOCK_E)
    t = tl.program_id(0) // blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.program_id(0) % blocks * BLOCK_E + tl.arange(0, BLOCK_E)
    place = tl.load(places + t, mask=t < T, other=-1).to(tl.int64)
    held = (place >= 0) & (place < tokens)
    place = tl.where(held, place, 0)
    at = place * x_t
    if not FLAT:
        at = place // L * x_b + place % L * x_t
    offset = at[:, None] + e.to(tl.int64)[None, :] * x_e
    inside = (e < E)[None, :]
    value = tl.load(x + offset, mask=held[:, None] & inside, other=0)
    tl.store(out + t.to(tl.int64)[:, None] * E + e[None, :], value, mask=(t < T)[:, None] & inside)


@triton.jit(do_not_specialize=["T", "tokens"])
def _invert(index, inverse, T, tokens, BLOCK: tl.constexpr):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(index + t, mask=t < T, other=-1)
    tl.store(inverse + place, t, mask=(place >= 0) & (place < tokens))


def _gather_tokens(x: Tensor, places: Tensor) -> Tensor:
    """``x (B, L, ...)``, ``places (T,)`` -> ``(T, ...)``."""
    out = x.new_empty((places.shape[0], *x.shape[2:]))
    (B, L), E = x.shape[:2], prod(x.shape[2:])
    if not out.numel():
        return out
    # A view wherever the trailing axes are one in memory.
    rows = x.view(_INTEGERS[x.element_size()]).reshape(B, L, E)
    x_b, x_t, x_e = rows.stride()
    flat = B == 1 or x_b == L * x_t
    BLOCK_E = min(triton.next_power_of_2(E), 1024)
    BLOCK_T = max(1, min(_BLOCK, _BYTES // (BLOCK_E * rows.element_size())))
    launch(
        _gather,
        (triton.cdiv(places.shape[0], BLOCK_T) * triton.cdiv(E, BLOCK_E),),
        x=rows,
        places=places,
        out=out.view(rows.dtype),
        T=places.shape[0],
        L=L,
        tokens=B * L,
        E=E,
        x_b=0 if flat else x_b,
        x_t=x_t,
        x_e=x_e,
        FLAT=flat,
        BLOCK_T=BLOCK_T,
        BLOCK_E=BLOCK_E,
        num_warps=4,
    )
    return out


def pack(x: Tensor, index: Tensor) -> Tensor:
    return _gather_tokens(x, index).unsqueeze(0)


def unpack(x: Tensor, index: Tensor, batch: int, length: int) -> Tensor:
    inverse = torch.full((batch * length,), -1, dtype=torch.int32, device=x.device)
    T = index.shape[0]
    index = index.contiguous()
    grid = (triton.cdiv(T, _BLOCK),)
    launch(_invert, grid, index=index, inverse=inverse, T=T, tokens=batch * length, BLOCK=_BLOCK)
    return _gather_tokens(x, inverse).unflatten(0, (batch, length))
