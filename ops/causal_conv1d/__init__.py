"""Depthwise causal convolution along the sequence, reset at the start of every document."""

import torch
from torch import Tensor

from packc.ops.causal_conv1d.op import MIXER
from packc.ops.sharded import Plan, offsets_of


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    plan: Plan | None = None,
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
        plan: in the place of ``cu_seqlens``, of a stream that is cut over ranks: see :class:`packc.ops.sharded.Plan`.

    Returns:
        ``out (B, L, D)``, contiguous and of x's dtype; with ``output_final_state`` also ``final_state (N, D, W - 1)``
        in fp32 (fp64 for fp64 inputs). Gradients flow through both, and into ``initial_state``.

    Raises:
        TypeError, ValueError: an argument's dtype or shape does not fit; the message names both.
    """
    if activation not in (None, "silu", "swish"):
        raise ValueError(f'activation must be None, "silu" or "swish", not {activation!r}')
    cu_seqlens = offsets_of(plan, cu_seqlens)
    tensors = {"x": x, "weight": weight, "bias": bias, "initial_state": initial_state}
    MIXER.shapes.check(tensors, cu_seqlens)
    if plan is not None:
        return plan.run(MIXER, (x, weight, bias, activation), initial_state, output_final_state)
    out, final_state = torch.ops.packc.causal_conv1d.default(
        x, weight, bias, activation, cu_seqlens, initial_state, output_final_state
    )
    return (out, final_state) if output_final_state else out
