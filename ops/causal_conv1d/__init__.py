"""Depthwise causal convolution along the sequence, reset at the start of every document."""

import torch
from torch import Tensor

from packc.ops import documents
from packc.ops.causal_conv1d.op import MIXER as MIXER

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``out[:, t, d] = act(bias[d] + sum_k weight[d, k] * x[:, t - (W - 1) + k, d])``, within documents.

    The short convolution of Mamba (Gu and Dao, arXiv 2312.00752, section 3.4) and of most linear-attention models.

    Args:
        x: ``(B, L, D)``, any strides; fp32, bf16, fp16 or fp64.
        weight: ``(D, W)``; the last tap meets the current token. Like ``bias`` it may be of another dtype than ``x``.
        bias: ``(D,)``.
        activation: None, ``"silu"``, or ``"swish"``, which is the same.
        cu_seqlens: ``(N + 1,)``, int32 or int64, rising from 0 to L: the documents of one packed row, so B is 1.
            Without it every batch row is a document.
        initial_state: ``(N, D, W - 1)``, the inputs that came before each document, oldest first; zeros without it.
        output_final_state: also return the state behind each document.

    Returns:
        ``out (B, L, D)``, contiguous and of x's dtype; with ``output_final_state`` also ``final_state (N, D, W - 1)``
        in fp32 (fp64 for fp64 inputs). Gradients flow through both, and into ``initial_state``.

    Raises:
        TypeError, ValueError: an argument's dtype or shape does not fit; the message names both.
    """
    if x.ndim != 3 or x.dtype not in _DTYPES:
        raise _refused(x, ValueError if x.dtype in _DTYPES else TypeError, "x must be (B, L, D) and floating")
    D = x.shape[2]
    if weight.ndim != 2 or documents.differ(weight.shape[0], D) or weight.shape[1] < 1:
        raise _refused(weight, ValueError, f"weight must be (D, W) with D = {D} and W >= 1")
    if bias is not None and (bias.ndim != 1 or documents.differ(bias.shape[0], D)):
        raise _refused(bias, ValueError, f"bias must be (D,) with D = {D}")
    if activation not in (None, "silu", "swish"):
        raise ValueError(f'activation must be None, "silu" or "swish", not {activation!r}')
    documents.check_cu_seqlens(cu_seqlens, x)
    N, W = documents.count(cu_seqlens, x), weight.shape[1]
    if initial_state is not None and (
        initial_state.ndim != 3
        or any(documents.differ(*sizes) for sizes in zip(initial_state.shape, (N, D, W - 1), strict=True))
    ):
        raise _refused(initial_state, ValueError, f"initial_state must be (N, D, W - 1) = ({N}, {D}, {W - 1})")
    for name, tensor in (("weight", weight), ("bias", bias), ("initial_state", initial_state)):
        if tensor is not None and tensor.dtype not in _DTYPES:
            raise _refused(tensor, TypeError, f"{name} must be floating")
    out, final_state = torch.ops.packc.causal_conv1d.default(
        x, weight, bias, activation, cu_seqlens, initial_state, output_final_state
    )
    return (out, final_state) if output_final_state else out


def _refused(tensor: Tensor, error: type[Exception], expected: str) -> Exception:
    return error(f"causal_conv1d: {expected}; got {tuple(tensor.shape)} of {tensor.dtype}")
