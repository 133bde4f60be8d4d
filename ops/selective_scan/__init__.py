"""The selective scan of Mamba-1 over documents."""

from __future__ import annotations

import torch
from torch import Tensor

from packc.ops import documents
from packc.ops.selective_scan import op as op


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
    _check(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
    out, final_state, _ = torch.ops.packc.selective_scan.default(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens, initial_state, output_final_state
    )
    return (out, final_state) if output_final_state else out


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Raises for arguments that do not fit. Sizes that only a run can tell are left to the kernels."""
    tensors = {
        "u": u,
        "delta": delta,
        "A": A,
        "B": B,
        "C": C,
        "D": D,
        "z": z,
        "delta_bias": delta_bias,
        "initial_state": initial_state,
    }
    for name, x in tensors.items():
        if x is not None and not x.is_floating_point():
            raise TypeError(f"selective_scan: {name} must be a floating-point tensor, not {x.dtype}")
        if x is not None and x.device != u.device:
            raise ValueError(f"selective_scan: {name} is on {x.device}, u on {u.device}")
    if u.ndim != 3:
        raise ValueError(f"selective_scan: u must be (B, L, D), not {tuple(u.shape)}")
    rows, tokens, channels = u.shape
    if A.ndim != 2 or documents.differ(A.shape[0], channels):
        raise ValueError(f"selective_scan: A must be (D, N) with u's D = {channels}, not {tuple(A.shape)}")
    documents.check_cu_seqlens(cu_seqlens, u, "u")
    states = A.shape[1]
    if B.ndim not in (3, 4) or C.ndim != B.ndim:
        raise ValueError(
            "selective_scan: B and C must both be (B, L, N) or both (B, L, G, N), "
            f"not {tuple(B.shape)} and {tuple(C.shape)}"
        )
    groups = B.shape[2:-1]
    if groups and (documents.differ(channels % groups[0], 0)):
        raise ValueError(f"selective_scan: B's G = {groups[0]} groups do not divide u's D = {channels} channels")
    wanted = {
        "delta": (rows, tokens, channels),
        "B": (rows, tokens, *groups, states),
        "C": (rows, tokens, *groups, states),
        "D": (channels,),
        "z": (rows, tokens, channels),
        "delta_bias": (channels,),
        "initial_state": (documents.count(cu_seqlens, u), channels, states),
    }
    for name, shape in wanted.items():
        x = tensors[name]
        if x is None:
            continue
        if x.ndim != len(shape) or any(documents.differ(a, b) for a, b in zip(x.shape, shape, strict=True)):
            raise ValueError(
                f"selective_scan: {name} must have shape {tuple(shape)}, not {tuple(x.shape)}, with u "
                f"{tuple(u.shape)} and A {tuple(A.shape)}"
            )
