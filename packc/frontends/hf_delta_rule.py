"""The gated delta rule of transformers, with one decay per head or per channel (Kimi Delta Attention)."""

from typing import Any

import torch

from packc import ops
from packc.frontends.hf import MODELING, heeded
from packc.frontends.keep_whole import KeptWhole


def chunked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    chunk_size: int = 64,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """``chunk_size`` says how to compute, not what."""
    if args or heeded(kwargs):
        return NotImplemented
    return _delta_rule(query, key, value, g, beta, initial_state, output_final_state, use_qk_l2norm_in_kernel)


def recurrent(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The same from token to token: the step of a generation."""
    if args or heeded(kwargs):
        return NotImplemented
    return _delta_rule(query, key, value, g, beta, initial_state, output_final_state, use_qk_l2norm_in_kernel)


def _delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    l2norm: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    dtype = query.dtype
    if l2norm:
        query, key = normalised(query), normalised(key)
    result: Any = ops.gated_delta_rule(
        query, key, value, g, beta, initial_state=initial_state, output_final_state=output_final_state
    )
    out, final_state = result if output_final_state else (result, None)
    return out.to(dtype), final_state


def normalised(x: torch.Tensor) -> torch.Tensor:
    """Of length one, in fp32 at least, as the kernels do."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


KEPT_WHOLE: KeptWhole = {
    MODELING: {
        "torch_chunk_gated_delta_rule": chunked,
        "torch_recurrent_gated_delta_rule": recurrent,
        "chunk_kimi_delta_attention": chunked,
        "recurrent_kimi_delta_attention": recurrent,
    }
}
