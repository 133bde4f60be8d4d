"""The Mamba-2 families of transformers: their functions, and packc's ops in their place."""

from typing import Any

import torch

from packc import ops
from packc.frontends.hf import MODELING, heeded
from packc.frontends.keep_whole import KeptWhole


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
    if args or heeded(kwargs):
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
    """None tells the model to go on with its conv and the scan above, as ``mamba_inner_fn`` does for Mamba-1."""
    return


KEPT_WHOLE: KeptWhole = {
    MODELING: {form.__name__: form for form in (mamba2_chunk_scan, mamba2_split_conv1d_scan_combined)}
}
