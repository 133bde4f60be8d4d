"""Linear attention over documents: without decay, with one per head, or with one per head and token."""

from __future__ import annotations

import torch
from torch import Tensor

from packc.ops.linear_attention.op import MIXER
from packc.ops.sharded import Plan, offsets_of


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    plan: Plan | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Causal linear attention with a scalar decay, each document on its own.

    For every head, with a state ``S (K, V)`` that begins each document anew::

        S[t]   = exp(g[t]) * S[t-1] + k[t] v[t]^T
        out[t] = scale * S[t]^T q[t]

    No ``g``: linear attention (Katharopoulos et al., https://arxiv.org/abs/2006.16236, without normaliser). ``g (H,)``:
    RetNet (https://arxiv.org/abs/2307.08621) and lightning attention (https://arxiv.org/abs/2401.04658). ``g (B, L,
    H)``: gated linear attention with scalar gates, which is SSD (https://arxiv.org/abs/2405.21060). Computed in chunks
    of 64 tokens, each document from its own start, with logarithms of decays summed, never exponentials divided.
    Arithmetic and states are fp32 whatever the inputs (fp64 if any input is). The backward keeps the inputs and one
    state a chunk.

    Args:
        q: queries ``(B, L, G, K)``, fp32, bf16, fp16 or fp64; head h of v uses head ``h // (H / G)``. Usually G is H.
        k: keys ``(B, L, G, K)``.
        v: values ``(B, L, H, V)``.
        g: logarithm of the decay, at most 0: ``(B, L, H)``, ``(H,)``, or None for none.
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
    MIXER.shapes.check({"q": q, "k": k, "v": v, "g": g, "initial_state": initial_state}, cu_seqlens)
    if g is not None:
        g = (g if g.dtype == torch.float64 else g.float()).expand(v.shape[:3])
    if scale is None:
        scale = max(q.shape[3], 1) ** -0.5
    if plan is not None:
        return plan.run(MIXER, (q, k, v, g, scale), initial_state, output_final_state)
    out, final_state, _ = torch.ops.packc.linear_attention.default(
        q,
        k,
        v,
        g,
        scale,
        cu_seqlens,
        initial_state,
        output_final_state,
    )
    return (out, final_state) if output_final_state else out
