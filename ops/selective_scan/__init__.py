"""The selective scan of Mamba-1 over documents."""

from __future__ import annotations

import torch
from torch import Tensor

from packc.ops.selective_scan.op import MIXER
from packc.ops.sharded import Plan, offsets_of


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    plan: Plan | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""The selective state-space recurrence of Mamba-1, each document on its own.

    For every channel, with a state ``h`` of size N that begins each document anew::

        delta  = softplus(delta + delta_bias)              # the softplus if delta_softplus
        h[t]   = exp(delta[t] * A) * h[t-1] + delta[t] * u[t] * B[t]
        out[t] = (sum_n C[t] * h[t] + D * u[t]) * silu(z[t])

    as in Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces"
    (https://arxiv.org/abs/2312.00752), Algorithm 2 and equation 2, with B discretised as ``delta * B``. Arithmetic and
    states are fp32 whatever the inputs (fp64 if any input is); the states of all tokens are never stored, forward or
    backward: the backward computes them again from one state every 64 tokens. Strided inputs are read in place.

    Args:
        u: input ``(B, L, D)``, fp32, bf16, fp16 or fp64.
        delta: step sizes ``(B, L, D)``, before bias and softplus; in units of tokens if A is per token.
        A: decay rates ``(D, N)``, real; negative for states that decay.
        B: input projections ``(B, L, N)``, or ``(B, L, G, N)`` where channel d uses group ``d // (D / G)``.
        C: output projections, of B's shape.
        D: weight of the skip connection ``(D,)``.
        z: gate ``(B, L, D)``, before SiLU.
        delta_bias: ``(D,)``, added to ``delta``.
        delta_softplus: whether softplus makes ``delta`` positive.
        cu_seqlens: int32 or int64 ``(documents + 1,)``, from 0 rising to L: where documents begin in the one packed row
            (B is 1). Empty documents are allowed. None: every row is a document.
        initial_state: the state before each document's first token, ``(documents, D, N)``; None: zeros.
        output_final_state: also return the state after each document's last token.
        plan: in the place of ``cu_seqlens``, of a stream that is cut over ranks: see :class:`packc.ops.sharded.Plan`.

    Floating-point dtypes may differ between arguments; each gradient has its argument's dtype. Documents are kept apart
    by selection: a NaN in one reaches no other.

    Returns:
        ``out (B, L, D)``, contiguous, in u's dtype; with ``output_final_state`` also the final states ``(documents, D,
        N)``, fp32 (fp64 if any input is), those of empty documents being their initial ones. Both are differentiable,
        as is ``initial_state``.

    Raises:
        TypeError: an argument is not a floating-point tensor (A may not be complex), or ``cu_seqlens`` not an integer
            one.
        ValueError: shapes do not fit each other, or ``cu_seqlens`` does not rise from 0 to L. On CUDA that is
            not looked at, which would wait for the device: offsets must be right.
    """
    cu_seqlens = offsets_of(plan, cu_seqlens)
    tensors = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    MIXER.shapes.check({**tensors, "initial_state": initial_state}, cu_seqlens)
    if plan is not None:
        return plan.run(MIXER, (u, delta, A, B, C, D, z, delta_bias, delta_softplus), initial_state, output_final_state)
    out, final_state, _ = torch.ops.packc.selective_scan.default(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens, initial_state, output_final_state
    )
    return (out, final_state) if output_final_state else out
