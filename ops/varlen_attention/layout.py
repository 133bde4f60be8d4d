"""How torch's attention kernels want their inputs: elements of a head side by side, q, k and v of one head size."""

import torch.nn.functional as F
from torch import Tensor


def readable(*tensors: Tensor, size: int) -> tuple[Tensor, ...]:
    """The tensors ``(1, T, G, D)`` with heads of ``size >= D`` elements: as they are if they can be read in place.

    Zeros behind the elements of q and k change no score, and those behind v give zeros behind out, to be cut off.
    Kernels read a head's elements one after another, whatever its last stride says, and tokens as rows of a matrix.
    """
    return tuple(_readable(tensor, size) for tensor in tensors)


def positive(q: Tensor, scale: float | None) -> tuple[Tensor, float, float]:
    """``q * sign``, a positive scale that gives it the same scores, and the sign of ``scale``: 1, -1 or 0.

    torch's flash attention hides a key by -inf first and scales then: a negative scale would show it, 0 make it NaN.
    """
    if scale is None:
        return q, q.shape[3] ** -0.5, 1.0
    sign = float((scale > 0) - (scale < 0))
    return (q if scale > 0 else q * sign), abs(scale) or 1.0, sign


def _readable(tensor: Tensor, size: int) -> Tensor:
    if tensor.shape[3] < size:
        return F.pad(tensor, (0, size - tensor.shape[3]))
    return tensor if tensor.stride(3) == 1 and tensor.stride(1) >= tensor.shape[3] else tensor.contiguous()
