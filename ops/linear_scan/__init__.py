"""The first-order linear recurrence over documents, channel by channel."""

from __future__ import annotations

import torch
from torch import Tensor

from packc.ops.linear_scan.op import MIXER
from packc.ops.sharded import Plan, offsets_of


def linear_scan(
    a: Tensor,
    b: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    plan: Plan | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""An elementwise linear recurrence over tokens, each document on its own.

    For every channel, with a state ``h`` that begins each document anew::

        h[t] = a[t] * h[t-1] + b[t]

    which is what an associative scan of ``(a, b)`` pairs under ``(a2 * a1, a2 * b1 + b2)`` computes (Blelloch, "Prefix
    Sums and Their Applications", CMU-CS-90-190; Martin and Cundy, https://arxiv.org/abs/1709.04057), the core of the
    RG-LRU of Griffin and RecurrentGemma (https://arxiv.org/abs/2402.19427, equation 4), of QRNN and SRU, and of scans
    that are written out over channels and states. Arithmetic and states are fp32 whatever the inputs (fp64 if any input
    is). The backward keeps the inputs and one state every 16 tokens, not ``h``, whose rounding it would inherit.

    Args:
        a: decays ``(B, L, ...)`` with any trailing shape, or none; fp32, bf16, fp16 or fp64. Of any sign and size.
        b: inputs, of a's shape.
        cu_seqlens: int32 or int64 ``(documents + 1,)``, from 0 rising to L: where documents begin in the one packed row
            (B is 1). Empty documents are allowed. None: every row is a document.
        initial_state: the state before each document's first token, ``(documents, ...)``; None: zeros.
        output_final_state: also return the state after each document's last token.
        plan: in the place of ``cu_seqlens``, of a stream that is cut over ranks: see :class:`packc.ops.sharded.Plan`.

    Floating-point dtypes may differ between arguments; each gradient has its argument's dtype. Documents are kept apart
    by selection: a NaN in one reaches no other. Strided inputs are read in place wherever their trailing axes can be
    viewed as one.

    Returns:
        ``h (B, L, ...)``, contiguous, in b's dtype; with ``output_final_state`` also the final states ``(documents,
        ...)``, fp32 (fp64 if any input is), those of empty documents being their initial ones. Both are differentiable,
        as is ``initial_state``.

    Raises:
        TypeError: an argument is not a floating-point tensor, or ``cu_seqlens`` not an integer one.
        ValueError: shapes do not fit each other (nothing is broadcast), or ``cu_seqlens`` does not rise from 0 to L. On
            CUDA that is not looked at, which would wait for the device: offsets must be right.
    """
    cu_seqlens = offsets_of(plan, cu_seqlens)
    MIXER.shapes.check({"a": a, "b": b, "initial_state": initial_state}, cu_seqlens)
    if plan is not None:
        return plan.run(MIXER, (a, b), initial_state, output_final_state)
    out, final_state, _ = torch.ops.packc.linear_scan.default(a, b, cu_seqlens, initial_state, output_final_state)
    return (out, final_state) if output_final_state else out
