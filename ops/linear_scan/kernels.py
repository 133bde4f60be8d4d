"""Which implementation runs. Those of C++ and Triton know three axes: rows, tokens, channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from packc.ops import dispatch
from packc.ops.linear_scan import reference

NAME = "linear_scan"


def forward(
    a: Tensor, b: Tensor, cu_seqlens: Tensor | None, initial_state: Tensor | None, output_final_state: bool
) -> tuple[Tensor, Tensor, Tensor]:
    choice = _choose(a, b, initial_state)
    if choice == "reference":
        return reference.forward(a, b, cu_seqlens, initial_state, output_final_state)
    run: Any
    if choice == "triton":
        from packc.ops.linear_scan.triton_forward import forward as run
    else:
        run = torch.ops.packc_cpu.linear_scan
    out, final_state, chunk_states = run(_tokens(a), _tokens(b), cu_seqlens, _states(initial_state), output_final_state)
    return out.view(b.shape), final_state.view(final_state.shape[0], *b.shape[2:]), chunk_states


def backward(
    dout: Tensor,
    dfinal_state: Tensor | None,
    chunk_states: Tensor,
    a: Tensor,
    b: Tensor,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """All contiguous and in their arguments' dtypes; empty for an absent argument."""
    choice = _choose(a, b, initial_state)
    if choice == "reference":
        da, db, dinitial = reference.backward(dout, dfinal_state, a, b, cu_seqlens, initial_state)
        return da, db, b.new_empty(0) if dinitial is None else dinitial
    run: Any
    if choice == "triton":
        from packc.ops.linear_scan.triton_backward import backward as run
    else:
        run = torch.ops.packc_cpu.linear_scan_bwd
    da, db, dinitial = run(
        _tokens(dout), _states(dfinal_state), chunk_states, _tokens(a), _tokens(b), cu_seqlens, _states(initial_state)
    )
    if initial_state is None:
        return da.view(a.shape), db.view(b.shape), b.new_empty(0)
    return da.view(a.shape), db.view(b.shape), dinitial.view(initial_state.shape).to(initial_state.dtype)


def _choose(a: Tensor, b: Tensor, initial_state: Tensor | None) -> str:
    # One fp64 argument makes fp64 states, which are the reference's.
    wide = reference.state_dtype(a, b, initial_state) == torch.float64
    return "reference" if wide else dispatch.choose(NAME, b)


def _tokens(x: Tensor) -> Tensor:
    """``(B, L, channels)``: a view wherever there can be one."""
    return x.flatten(2) if x.ndim > 2 else x.unsqueeze(2)


def _states(state: Tensor | None) -> Tensor | None:
    """``(documents, channels)``, fp32 and contiguous, as small things are."""
    if state is None:
        return None
    return (state.flatten(1) if state.ndim > 1 else state.unsqueeze(1)).float().contiguous()
