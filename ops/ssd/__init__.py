"""SSD, the state-space recurrence of Mamba-2, over documents."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from packc.ops.sharded import Plan, offsets_of
from packc.ops.ssd.op import MIXER


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    *,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    plan: Plan | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""The selective state-space recurrence of Mamba-2, each document on its own.

    For every head, with a state ``h (P, N)`` that begins each document anew::

        dt     = clamp(softplus(dt + dt_bias), *dt_limit)    # the softplus if dt_softplus
        h[t]   = exp(dt[t] * A) * h[t-1] + dt[t] * x[t] B[t]^T
        out[t] = (h[t] C[t] + D * x[t]) * silu(z[t])

    as in Dao and Gu, "Transformers are SSMs" (https://arxiv.org/abs/2405.21060), equation 1 and section 6. It is
    :func:`packc.ops.linear_attention` with ``q = C, k = B, v = dt * x, g = dt * A``, and runs the same kernel: chunks
    of 64 tokens, each document from its own start. Arithmetic and states are fp32 whatever the inputs (fp64 if any
    input is).

    Args:
        x: input ``(B, L, H, P)``, fp32, bf16, fp16 or fp64.
        dt: step sizes ``(B, L, H)``, before bias, softplus and limits.
        A: decay rates ``(H,)``; negative for states that decay.
        B: input projections ``(B, L, G, N)``, or ``(B, L, N)`` of one group; head h uses group ``h // (H / G)``.
        C: output projections, of B's shape.
        D: weight of the skip connection, ``(H,)`` or ``(H, P)``.
        z: gate ``(B, L, H, P)``, before SiLU.
        dt_bias: ``(H,)``, added to ``dt``.
        dt_softplus: whether softplus makes ``dt`` positive.
        dt_limit: least and largest step size.
        cu_seqlens: int32 or int64 ``(documents + 1,)``, from 0 rising to L: where documents begin in the one packed row
            (B is 1). Empty documents are allowed. None: every row is a document.
        initial_state: the state before each document's first token, ``(documents, H, P, N)``; None: zeros.
        output_final_state: also return the state after each document's last token.
        plan: in the place of ``cu_seqlens``, of a stream that is cut over ranks: see :class:`packc.ops.sharded.Plan`.

    Floating-point dtypes may differ between arguments; each gradient has its argument's dtype. Documents never meet in
    one product: a NaN in one reaches no other. Strided inputs are read in place.

    Returns:
        ``out (B, L, H, P)``, contiguous, in x's dtype; with ``output_final_state`` also the final states ``(documents,
        H, P, N)``, fp32 (fp64 if any input is), those of empty documents being their initial ones. Both are
        differentiable, as is ``initial_state``.

    Raises:
        TypeError: an argument is not a floating-point tensor, or ``cu_seqlens`` not an integer one.
        ValueError: shapes do not fit each other, or ``cu_seqlens`` does not rise from 0 to L. On CUDA that is
            not looked at, which would wait for the device: offsets must be right.
    """
    cu_seqlens = offsets_of(plan, cu_seqlens)
    tensors = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    MIXER.shapes.check({**tensors, "initial_state": initial_state}, cu_seqlens)
    if B.ndim == 3:
        B, C = B.unsqueeze(2), C.unsqueeze(2)
    dt = _step_sizes(dt, dt_bias, dt_softplus, dt_limit)
    if plan is not None:
        return plan.run(MIXER, (x, dt, A, B, C, D, z), initial_state, output_final_state)
    out, final_state, _ = torch.ops.packc.ssd.default(
        x, dt, A, B, C, D, z, cu_seqlens, initial_state, output_final_state
    )
    return (out, final_state) if output_final_state else out


def _step_sizes(dt: Tensor, bias: Tensor | None, softplus: bool, limit: tuple[float, float]) -> Tensor:
    """In fp32 at least: few values, on which everything hangs."""
    dt = dt.to(torch.promote_types(dt.dtype, torch.float32))
    if bias is not None:
        dt = dt + bias
    if softplus:
        # On CPU torch rounds the last elements of a tensor in another way than the rest, so that a token's step would
        # depend on where it lies: not after fp64.
        dt = F.softplus(dt.double()).to(dt.dtype) if dt.device.type == "cpu" else F.softplus(dt)
    lowest, highest = limit
    return dt.clamp(lowest, highest)
