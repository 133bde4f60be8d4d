"""The gated delta rule over documents: with one decay per head and token, or one per channel of the keys."""

from __future__ import annotations

import torch
from torch import Tensor

from packc.ops.gated_delta_rule.op import MIXER
from packc.ops.sharded import Plan, offsets_of


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    plan: Plan | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Causal linear attention whose state forgets, then corrects what it says of a key; each document on its own.

    For every head, with a state ``S (K, V)`` that begins each document anew::

        S'     = exp(g[t]) * S[t-1]                                  # of every channel of K, if g has them
        S[t]   = S' + beta[t] * k[t] (v[t] - S'^T k[t])^T
        out[t] = scale * S[t]^T q[t]

    With ``g (B, L, H)``: Gated DeltaNet (https://arxiv.org/abs/2412.06464), as in Qwen3-Next; zeros make it DeltaNet
    (https://arxiv.org/abs/2406.06484). With ``g (B, L, H, K)``: Kimi Delta Attention
    (https://arxiv.org/abs/2510.26692). q and k are taken as they are: models normalise them first, and without it
    (``beta |k|^2`` beyond 2) the state grows without bound. Computed in chunks of 64 tokens, each document from its own
    start; logarithms of decays are summed over just the tokens in question, and no exponential of a positive number is
    taken; arithmetic and states are fp32 whatever the inputs (fp64 if any input is). The backward keeps the inputs and
    one state a chunk.

    Args:
        q: queries ``(B, L, G, K)``, fp32, bf16, fp16 or fp64; head h of v uses head ``h // (H / G)``. Usually G is H.
        k: keys ``(B, L, G, K)``.
        v: values ``(B, L, H, V)``.
        g: logarithm of the decay, at most 0: ``(B, L, H)``, or ``(B, L, H, K)`` with one for every channel of the keys.
        beta: how much of the error is corrected, ``(B, L, H)``; usually between 0 and 1.
        scale: of the output; ``K ** -0.5`` without it.
        cu_seqlens: int32 or int64 ``(documents + 1,)``, from 0 rising to L: where documents begin in the one packed row
            (B is 1). Empty documents are allowed. None: every row is a document.
        initial_state: the state before each document's first token, ``(documents, H, K, V)``; None: zeros.
        output_final_state: also return the state after each document's last token.
        plan: in the place of ``cu_seqlens``, of a stream that is cut over ranks: see :class:`packc.ops.sharded.Plan`.

    Floating-point dtypes may differ between arguments; each gradient has its argument's dtype. Documents never meet in
    one product: a NaN in one reaches no other. Strided inputs are read in place.

    Returns:
        ``out (B, L, H, V)``, contiguous, in v's dtype; with ``output_final_state`` also the final states ``(documents,
        H, K, V)``, fp32 (fp64 if any input is), those of empty documents being their initial ones. Both are
        differentiable, as is ``initial_state``.

    Raises:
        TypeError: an argument is not a floating-point tensor, or ``cu_seqlens`` not an integer one.
        ValueError: shapes do not fit each other, or ``cu_seqlens`` does not rise from 0 to L. On CUDA that is
            not looked at, which would wait for the device: offsets must be right.
    """
    cu_seqlens = offsets_of(plan, cu_seqlens)
    MIXER.shapes.check({"q": q, "k": k, "v": v, "g": g, "beta": beta, "initial_state": initial_state}, cu_seqlens)
    if scale is None:
        scale = max(q.shape[3], 1) ** -0.5
    if plan is not None:
        return plan.run(MIXER, (q, k, v, g, beta, scale), initial_state, output_final_state)
    out, final_state, _ = torch.ops.packc.gated_delta_rule.default(
        q,
        k,
        v,
        g,
        beta,
        scale,
        cu_seqlens,
        initial_state,
        output_final_state,
    )
    return (out, final_state) if output_final_state else out
