"""The Mamba-2 family of Hugging Face transformers (>= 5.15): its functions, and packc's ops in their place."""

from typing import Any

import torch

from packc import ops
from packc.frontends import hf_mamba
from packc.frontends.keep_whole import PackedForm

# What mamba-ssm's and causal-conv1d's kernels make something of. These models hand down to their mixers whatever they
# were called with (``output_router_logits``), and the torch code of transformers takes no notice of any of it.
_HEEDED = ("z", "seq_idx", "cu_seqlens", "return_varlen_states", "initial_states", "return_final_states")


def causal_conv1d_fn(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if _heeded(kwargs):
        return NotImplemented
    return hf_mamba.causal_conv1d_fn(hidden_states, weight, bias, activation, *args)


def mamba2_chunk_scan(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The result has the dtype of ``hidden_states``, as that of mamba-ssm's kernel has; the torch code of transformers
    returns fp32, which every model then casts back. ``chunk_size`` says how to compute, not what."""
    if args or _heeded(kwargs):
        return NotImplemented
    return ops.ssd(
        hidden_states,
        dt,
        A,
        B,
        C,
        D,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        initial_state=initial_states,
        output_final_state=return_final_states,
    )


def mamba2_split_conv1d_scan_combined(*args: Any, **kwargs: Any) -> None:
    """None tells the model to go on with the two functions above, as ``mamba_inner_fn`` does for Mamba-1."""
    return


def _heeded(kwargs: dict[str, Any]) -> bool:
    return any(kwargs.get(name) is not None for name in _HEEDED)


KEPT_WHOLE: dict[str, dict[str, PackedForm]] = {
    f"transformers.models.{family}.modeling_{family}": {
        form.__name__: form for form in (causal_conv1d_fn, mamba2_chunk_scan, mamba2_split_conv1d_scan_combined)
    }
    for family in ("mamba2", "bamba", "zamba2", "falcon_h1", "nemotron_h", "granitemoehybrid")
}
"""Module -> name of its function -> the same with packc's ops."""
