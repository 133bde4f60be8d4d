"""``packc::linear_scan`` and ``packc::linear_scan_bwd``: schemas, fakes, FLOPs and autograd.

The forward also returns the states that leave every whole chunk of 16 tokens of a row, ``(B, L // 16, ...)`` flattened;
the backward computes the others again, chunk by chunk.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from packc.ops import derivatives, documents
from packc.ops.flops import flop_formula
from packc.ops.linear_scan import kernels, reference
from packc.ops.mixer import Mixer, declare

_lib = torch.library.Library("packc", "FRAGMENT")
_lib.define(
    "linear_scan(Tensor a, Tensor b, Tensor? cu_seqlens, Tensor? initial_state, bool output_final_state) "
    "-> (Tensor out, Tensor final_state, Tensor chunk_states)"
)
_lib.define(
    "linear_scan_bwd(Tensor dout, Tensor? dfinal_state, Tensor chunk_states, Tensor a, Tensor b, Tensor? cu_seqlens, "
    "Tensor? initial_state) -> (Tensor da, Tensor db, Tensor dinitial_state)"
)
declare(Mixer("linear_scan", per_token=("a", "b"), enter_state=("b",), gives_zero=("b",)))


def _forward_fake(
    a: Tensor, b: Tensor, cu_seqlens: Tensor | None, initial_state: Tensor | None, output_final_state: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = reference.state_dtype(a, b, initial_state)
    rows, tokens, *channels = b.shape
    states = documents.count(cu_seqlens, b) if output_final_state else 0
    return (
        b.new_empty(b.shape),
        b.new_empty((states, *channels), dtype=dtype),
        b.new_empty((rows * (tokens // reference.CHUNK) * math.prod(channels),), dtype=dtype),
    )


def _backward_fake(
    dout: Tensor,
    dfinal_state: Tensor | None,
    chunk_states: Tensor,
    a: Tensor,
    b: Tensor,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        a.new_empty(a.shape),
        b.new_empty(b.shape),
        b.new_empty(0) if initial_state is None else initial_state.new_empty(initial_state.shape),
    )


for _key in ("CPU", "CUDA"):
    _lib.impl("linear_scan", kernels.forward, _key)
    _lib.impl("linear_scan_bwd", kernels.backward, _key)
torch.library.register_fake("packc::linear_scan", _forward_fake, lib=_lib)
torch.library.register_fake("packc::linear_scan_bwd", _backward_fake, lib=_lib)


# ---- FLOPs -----------------------------------------------------------------------------------------------------------


@flop_formula(torch.ops.packc.linear_scan)
def _forward_flops(a_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * math.prod(a_shape)


@flop_formula(torch.ops.packc.linear_scan_bwd)
def _backward_flops(dout_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """The recurrence again (2), dh (2) and da."""
    return 5 * math.prod(dout_shape)


# ---- autograd --------------------------------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    a, b, cu_seqlens, initial_state, ctx.output_final_state = inputs
    ctx.save_for_backward(output[2], a, b, cu_seqlens, initial_state)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dout: Tensor | None, dfinal_state: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    chunk_states, a, b, cu_seqlens, initial_state = ctx.saved_tensors
    da, db, dinitial_state = torch.ops.packc.linear_scan_bwd.default(
        b.new_zeros(b.shape) if dout is None else dout,
        dfinal_state if ctx.output_final_state else None,
        chunk_states,
        a,
        b,
        cu_seqlens,
        initial_state,
    )
    return da, db, None, None if initial_state is None else dinitial_state, None


derivatives.register(_lib, "linear_scan", kernels.forward, _setup_context, _autograd)
derivatives.register_gradients(_lib, "linear_scan_bwd", kernels.backward)
