"""The Triton kernels behind the op's signatures."""

from typing import Any

import torch
import triton
from torch import Tensor

from packc.ops import documents
from packc.ops.causal_conv1d import reference, triton_bwd, triton_fwd, triton_states
from packc.ops.tritonsrc.documents import document_of_token
from packc.ops.tritonsrc.launch import autotuned, launch

_CHUNK = 256  # tokens whose parameter gradients are summed by one program
_STATE_ELEMENTS = 256  # of a program's states


def _configs(*sizes: tuple[int, int, int, int], maxnreg: int | None = None) -> list[triton.Config]:
    return [
        triton.Config({"ROWS": r, "STEPS": s, "BLOCK_D": d}, num_warps=warps, maxnreg=maxnreg)
        for r, s, d, warps in sizes
    ]


_KEY = ["D", "X_STEP", "W", "SILU"]  # models fix all of these
_NARROW = 4  # taps for which there are registers in plenty
_WIDEST = 8  # taps for which there are enough; plain torch serves filters beyond
_forward = autotuned(_configs((4, 8, 128, 4), (4, 4, 256, 4)), _KEY)(triton_fwd.forward)
# All registers there are: ptxas takes fewer of its own accord, for the sake of more warps, and spills.
_backward = autotuned(_configs((4, 8, 64, 4), (4, 4, 64, 4), maxnreg=255), _KEY)(triton_bwd.backward)
# Of bf16 and fp16 a thread loads four channels at once, not two.
_half_backward = autotuned(_configs((4, 4, 128, 4), (4, 8, 64, 2)), _KEY)(triton_bwd.backward)
# For wide filters; and for channel-first inputs, of which few channels' lines stay in the first-level cache.
_SMALL = _configs((16, 4, 16, 4), (8, 8, 16, 4))
_small_forward = autotuned(_SMALL, _KEY)(triton_fwd.forward)
_small_backward = autotuned(_SMALL, _KEY)(triton_bwd.backward)


def _small(x: Tensor, W: int) -> bool:
    return x.stride(1) == 1 or W > _NARROW


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor]:
    (B, L, D), W = x.shape, weight.shape[1]
    if W > _WIDEST:
        return reference.forward(x, weight, bias, activation, cu_seqlens, initial_state, output_final_state)
    cu_seqlens, of_token = _boundaries(cu_seqlens, L)
    out = x.new_empty(x.shape)
    launch(
        _small_forward if _small(x, W) else _forward,
        lambda config: (B * triton.cdiv(L, config["ROWS"] * config["STEPS"]) * triton.cdiv(D, config["BLOCK_D"]),),
        **_walked("x", x),
        **_parameters(weight, bias),
        **_strided("initial_state", initial_state, "state"),
        cu_seqlens=cu_seqlens,
        documents=of_token,
        out=out,
        L=L,
        D=D,
        W=W,
        SILU=activation is not None,
    )
    N = documents.count(cu_seqlens, x) if output_final_state else 0
    final_state = x.new_empty((N, D, W - 1), dtype=torch.float32)
    if final_state.numel():
        _launch_states(
            triton_states.final_states,
            final_state,
            **_tokens("x", x),
            **_strided("initial_state", initial_state, "state"),
            cu_seqlens=cu_seqlens,
            final_state=final_state,
            L=L,
        )
    return out, final_state


def backward(
    dout: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor | None, ...]:
    (B, L, D), W = x.shape, weight.shape[1]
    if W > _WIDEST:
        return reference.backward(dout, dfinal_state, x, weight, bias, activation, cu_seqlens, initial_state)
    cu_seqlens, of_token = _boundaries(cu_seqlens, L)
    common = {
        **_strided("dfinal_state", dfinal_state, "final"),
        **_parameters(weight, bias),
        **_strided("initial_state", initial_state, "state"),
        "cu_seqlens": cu_seqlens,
        "L": L,
        "SILU": activation is not None,
    }
    dx, dweight = x.new_empty(x.shape), weight.new_empty(weight.shape)
    dbias = None if bias is None else bias.new_empty(bias.shape)
    units = B * triton.cdiv(L, _CHUNK)
    partial = x.new_empty((units, W + 1, D), dtype=torch.float32)
    wide_backward = _backward if x.dtype == torch.float32 else _half_backward
    launch(
        _small_backward if _small(x, W) else wide_backward,
        lambda config: (units * triton.cdiv(D, config["BLOCK_D"]),),
        **common,
        **_walked("dout", dout),
        **_walked("x", x),
        documents=of_token,
        dx=dx,
        partial=partial,
        D=D,
        W=W,
        CHUNK=_CHUNK,
    )
    launch(
        triton_bwd.sum_partials,
        (triton.cdiv(D, 32), W + 1),
        partial=partial,
        dweight=dweight,
        dbias=dbias,
        units=units,
        D=D,
        W=W,
        BLOCK=32,
        BLOCK_D=32,
        num_warps=4,
    )
    dinitial_state = None if initial_state is None else initial_state.new_empty(initial_state.shape)
    if dinitial_state is not None and dinitial_state.numel():
        _launch_states(
            triton_states.initial_state_grads,
            dinitial_state,
            **common,
            **_tokens("dout", dout),
            **_tokens("x", x),
            dinitial_state=dinitial_state,
        )
    return dx, dweight, dbias, dinitial_state


def _boundaries(cu_seqlens: Tensor | None, L: int) -> tuple[Tensor | None, Tensor | None]:
    """cu_seqlens, dense, and the document of every token."""
    if cu_seqlens is None:
        return None, None
    cu_seqlens = cu_seqlens.contiguous()
    return cu_seqlens, document_of_token(cu_seqlens, L)


def _strided(name: str, tensor: Tensor | None, prefix: str | None = None) -> dict[str, Any]:
    """The arguments of a tensor that is read in place: itself and its strides."""
    return {name: tensor, f"{prefix or name}_strides": None if tensor is None else tensor.stride()}


def _tokens(name: str, x: Tensor) -> dict[str, Any]:
    """Of a tensor ``(B, L, D)``: itself and its strides, each of which kernels are compiled for in another way."""
    row, token, channel = x.stride()
    return {name: x, f"{name}_row": row, f"{name}_token": token, f"{name}_channel": channel}


def _parameters(weight: Tensor, bias: Tensor | None) -> dict[str, Any]:
    return {**_strided("weight", weight), **_strided("bias", bias)}


def _walked(name: str, x: Tensor) -> dict[str, Any]:
    """The arguments of a tensor ``(B, L, D)`` whose tokens are walked along.

    That rows begin at a multiple of 16 elements is said only if tokens do: so a new length compiles nothing new.
    """
    row, token, channel = x.stride()
    aligned = token % 16 == 0 and (x.shape[0] == 1 or row % 16 == 0)
    upper = name.upper()
    return {
        name: x,
        f"{name}_row": row,
        f"{name}_channel": channel,
        f"{upper}_STEP": token,
        f"{upper}_ALIGNED": aligned,
    }


def _launch_states(kernel: Any, states: Tensor, **arguments: Any) -> None:
    """One program a document and block of channels; ``states (N, D, W - 1)`` are not empty."""
    N, D, slots = states.shape
    SLOTS = triton.next_power_of_2(slots)
    BLOCK_D = max(1, _STATE_ELEMENTS // SLOTS)
    grid = (N * triton.cdiv(D, BLOCK_D),)
    launch(kernel, grid, **arguments, D=D, W=slots + 1, SLOTS=SLOTS, BLOCK_D=BLOCK_D, num_warps=4)
