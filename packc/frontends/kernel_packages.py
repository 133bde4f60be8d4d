"""The packages that models call by themselves: causal-conv1d, mamba-ssm, flash-linear-attention, and mambapy.

Kernels of the first three know no padding, and most of them no compiler; the last is plain torch. Layouts are each
package's own: the convolution and the Mamba-1 scan of the first two are channel-first, (B, D, L).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from packc import ops
from packc.frontends import hf_delta_rule
from packc.frontends.keep_whole import ByName, KeptWhole, Method


def _says_something(others: dict[str, Any]) -> bool:
    """Whether an argument that a form does not name was given a meaning."""
    return any(value is not None and value is not False for value in others.values())


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    activation: str | None = None,
    **others: Any,
) -> Any:
    if _says_something(others):
        return NotImplemented
    result: Any = ops.causal_conv1d(
        x.transpose(1, 2),
        weight,
        bias,
        activation=activation,
        initial_state=initial_states,
        output_final_state=return_final_states,
    )
    if return_final_states:
        return result[0].transpose(1, 2), result[1].to(x.dtype)
    return result.transpose(1, 2)


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **others: Any,
) -> Any:
    """B and C of every token, in one group: ``(B, N, L)`` or ``(B, 1, N, L)``."""
    of_tokens = [each[:, 0] if each.dim() == 4 and each.shape[1] == 1 else each for each in (B, C)]
    if _says_something(others) or A.is_complex() or any(each.dim() != 3 for each in of_tokens):
        return NotImplemented
    result: Any = ops.selective_scan(
        u.transpose(1, 2),
        delta.transpose(1, 2),
        A,
        of_tokens[0].transpose(1, 2),
        of_tokens[1].transpose(1, 2),
        D,
        None if z is None else z.transpose(1, 2),
        delta_bias,
        delta_softplus,
        output_final_state=return_last_state,
    )
    return (result[0].transpose(1, 2), result[1]) if return_last_state else result.transpose(1, 2)


def selective_scan_of_a_block(
    self: Any, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, **others: Any
) -> Any:
    """mambapy's, token-major: x and delta ``(B, L, D)``, B and C ``(B, L, N)``."""
    return NotImplemented if _says_something(others) else ops.selective_scan(x, delta, A, B, C, D)


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,  # says when to compute, not what
    **others: Any,
) -> Any:
    """All of a Mamba-1 block behind its first projection: ``xz (B, 2 D, L)`` -> ``(B, L, D_model)``."""
    if _says_something(others) or A.is_complex():
        return NotImplemented
    x, z = xz.transpose(1, 2).chunk(2, dim=2)
    mixed: Any = ops.causal_conv1d(x, conv1d_weight.flatten(1), conv1d_bias, activation="silu")
    delta, B, C = F.linear(mixed, x_proj_weight).split([delta_proj_weight.shape[1], A.shape[1], A.shape[1]], dim=-1)
    delta = F.linear(delta, delta_proj_weight)
    out: Any = ops.selective_scan(mixed, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return F.linear(out, out_proj_weight, out_proj_bias)


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,  # says how to compute, not what
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **others: Any,
) -> Any:
    if _says_something(others):
        return NotImplemented
    return ops.ssd(
        x,
        dt,
        A,
        B,
        C,
        D,
        z,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        initial_state=initial_states,
        output_final_state=return_final_states,
    )


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    **others: Any,
) -> Any:
    """All of a Mamba-2 block behind its first projection: ``(B, L, 2 H P + 2 G N + H)`` -> ``(B, L, D_model)``."""
    heads = A.shape[0]
    inner = heads * (D.shape[1] if headdim is None else headdim)
    states = (conv1d_weight.shape[0] - inner) // 2
    if _says_something(others) or zxbcdt.shape[-1] != 2 * inner + 2 * states + heads:  # an MLP of its own beside it
        return NotImplemented
    z, xBC, dt = zxbcdt.split([inner, inner + 2 * states, heads], dim=-1)
    mixed: Any = ops.causal_conv1d(xBC, conv1d_weight, conv1d_bias, activation=activation)
    x, B, C = mixed.split([inner, states, states], dim=-1)
    x, gate = (each.unflatten(-1, (heads, inner // heads)) for each in (x, z))
    B, C = (each.unflatten(-1, (ngroups, states // ngroups)) for each in (B, C))
    out: Any = ops.ssd(
        x,
        dt,
        A,
        B,
        C,
        D,
        gate if rmsnorm_weight is None else None,
        dt_bias=dt_bias,
        dt_softplus=True,
        dt_limit=dt_limit,
    )
    out = out.flatten(2)
    if rmsnorm_weight is not None:
        wide, silu = out.float(), F.silu(z.float())
        if not norm_before_gate:
            wide = wide * silu
        grouped = wide.unflatten(-1, (ngroups, inner // ngroups))
        wide = (grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + rmsnorm_eps)).flatten(2)
        wide = wide * rmsnorm_weight.float()
        out = (wide * silu if norm_before_gate else wide).to(out.dtype)
    return out if outproj_weight is None else F.linear(out, outproj_weight, outproj_bias)


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **others: Any,
) -> Any:
    """With one decay per head, or per channel (``chunk_kda``); gates and their activations are computed outside."""
    if _says_something(others) or g is None or beta is None or beta.dim() != 3:
        return NotImplemented
    dtype = q.dtype
    if use_qk_l2norm_in_kernel:
        q, k = hf_delta_rule.normalised(q), hf_delta_rule.normalised(k)
    result: Any = ops.gated_delta_rule(
        q, k, v, g, beta, scale, initial_state=initial_state, output_final_state=output_final_state
    )
    out, final_state = result if output_final_state else (result, None)
    return out.to(dtype), final_state


KEPT_WHOLE: KeptWhole = {
    "causal_conv1d.causal_conv1d_interface": {"causal_conv1d_fn": ByName(causal_conv1d_fn)},
    "mamba_ssm.ops.selective_scan_interface": {
        "selective_scan_fn": ByName(selective_scan_fn),
        "mamba_inner_fn": ByName(mamba_inner_fn),
    },
    "mamba_ssm.ops.triton.ssd_combined": {
        "mamba_chunk_scan_combined": ByName(mamba_chunk_scan_combined),
        "mamba_split_conv1d_scan_combined": ByName(mamba_split_conv1d_scan_combined),
    },
    "mambapy.mamba": {"MambaBlock": Method("selective_scan", ByName(selective_scan_of_a_block))},
    "fla.ops.*": {
        "chunk_gated_delta_rule": ByName(chunk_gated_delta_rule),
        "fused_recurrent_gated_delta_rule": ByName(chunk_gated_delta_rule),
        "chunk_kda": ByName(chunk_gated_delta_rule),
        "fused_recurrent_kda": ByName(chunk_gated_delta_rule),
    },
}
