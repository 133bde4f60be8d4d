"""Linear attention's backward on Triton; the formulas are in ``csrc/linear_attention_bwd.h``.

After the gradients of the states between chunks, one kernel makes dv of every chunk and head, a second the gradients of
the scores, and a third dq or dk of them. The last walks the heads of a group, which share q and k, in parts that torch
adds up: two, however many chunks there are, as a document's bits shall not depend on its neighbours.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from packc.ops.common.chunks import CHUNK, chunk_states_shape
from packc.ops.common.triton_chunks import (
    chunks_of,
    countable,
    shared_arguments,
    state_strides,
    token_strides,
)
from packc.ops.linear_attention.reference import Gradients
from packc.ops.linear_attention.triton_forward import key_major
from packc.ops.linear_attention.triton_grad_pairs import grad_pairs
from packc.ops.linear_attention.triton_grad_qk import grad_qk
from packc.ops.linear_attention.triton_grad_v import grad_v
from packc.ops.linear_attention.triton_states import block_of, carry_states, half_block_of
from packc.ops.tritonsrc.launch import launch, taken

_PARTS = 2  # of 4096 tokens, with heads of 128, 512 programs


def backward(
    dout: Tensor,
    dfinal_state: Tensor | None,
    chunk_states: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    step: Tensor | None,
    skip: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    value_major: bool,
) -> Gradients:
    """In fp32 where parts are added up, else in the arguments' dtypes."""
    dout, q, k, v, g, step = countable(dout, q, k, v, g, step)
    chunks = chunks_of(cu_seqlens, v)
    rows, tokens, heads, V = v.shape
    groups, K = k.shape[2:]
    block_k, block_v = half_block_of(K, v.dtype), block_of(V, v.dtype)
    blocks_k, blocks_v = triton.cdiv(K, block_k), max(1, triton.cdiv(V, block_v))
    kept = chunk_states.view(chunk_states_shape(k, v))
    dkept = torch.empty_like(kept)
    initial, dfinal = key_major(initial_state, value_major), key_major(dfinal_state, value_major)
    dinitial = None if initial_state is None else torch.empty_like(initial_state, memory_format=torch.contiguous_format)
    carry_states(q, dout, g, None, scale, chunks, dfinal, key_major(dinitial, value_major), dkept, reverse=True)

    shared = shared_arguments(k, v, chunks) | {"g": g, "step": step, "scale": float(scale), "V": V}
    shared |= {"BLOCK_K": block_k, "BLOCK_V": block_v, **token_strides(g=g, step=step)}
    tokens_of = {"q": q, "k": k, "v": v, "dout": dout} | token_strides(q=q, k=k, v=v, dout=dout)
    states = {"dkept": dkept, "dfinal": dfinal, "slots": kept.shape[1], "WIDE_V": kept.shape[4]} | state_strides(
        dfinal=dfinal
    )
    per_block = rows * tokens * heads
    dv = v.new_empty(v.shape)
    dstep = None if step is None else kept.new_empty((blocks_v, rows, tokens, heads))
    dskip = None if skip is None else kept.new_zeros((chunks.bound, heads, V))
    launch(
        grad_v,
        (chunks.bound, heads, blocks_v),
        **taken(grad_v, shared),
        **tokens_of,
        **states,
        **token_strides(dv=dv, dstep=None if dstep is None else dstep[0]),
        skip=skip,
        dv=dv,
        dstep=dstep,
        dskip=dskip,
        per_block=per_block,
    )

    dscores = kept.new_empty((chunks.bound, heads, CHUNK, CHUNK))
    dg = None if g is None else kept.new_empty((1 + 2 * blocks_k, rows, tokens, heads))
    dg_strides = token_strides(dg=None if dg is None else dg[0])
    launch(
        grad_pairs,
        (chunks.bound, heads),
        **taken(grad_pairs, shared),
        **tokens_of,
        **dg_strides,
        dscores=dscores,
        dg=None if dg is None else dg[-1],
    )
    parts = max(1, min(_PARTS, heads // max(groups, 1)))
    dq, dk = (v.new_empty((parts, *x.shape), dtype=x.dtype if parts == 1 else torch.float32) for x in (q, k))
    for of_keys, (other, own, x, dx) in enumerate([(k, q, dout, dq), (q, k, v, dk)]):
        launch(
            grad_qk,
            (chunks.bound, groups * parts, blocks_k),
            **taken(grad_qk, shared | {"BLOCK_V": half_block_of(V, v.dtype)}),
            **states,
            **token_strides(other=other, own=own, x=x, dx=dx[0]),
            **dg_strides,
            **state_strides(initial=initial),
            other=other,
            own=own,
            x=x,
            kept=kept,
            initial=initial,
            dscores=dscores,
            dx=dx,
            dg=None if dg is None else dg[of_keys * blocks_k :],
            parts=parts,
            per_part=rows * tokens * groups * K,
            per_block=per_block,
            KEYS=bool(of_keys),
        )
    return Gradients(
        q=_sum(dq),
        k=_sum(dk),
        v=dv,
        g=None if dg is None else dg.sum(0),
        step=None if dstep is None else _sum(dstep),
        skip=None if dskip is None else dskip.sum(0),
        initial_state=dinitial,
    )


def _sum(parts: Tensor) -> Tensor:
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)
