"""The Mamba-1 families of transformers: their functions, and packc's ops in their place.

The scan is channel-first, (B, D, L); packc's op is token-major, (B, L, D), and reads transposed views in place.
"""

from typing import Any

import torch

from packc import ops
from packc.frontends.hf import MODELING
from packc.frontends.keep_whole import KeptWhole


def mamba_selective_scan(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    use_mambapy: bool = False,
    use_associative_scan: bool = False,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The result has the dtype of ``hidden_states``, as that of mamba-ssm's kernel has. The torch code of transformers
    returns the dtype that D promotes it to (fp32 in a bf16 model), which every model then casts back."""
    # use_mambapy and use_associative_scan choose between three ways to the same result: nothing to do here. Groups of B
    # and C, a fourth axis, are mamba-ssm's alone.
    if args or not _all_none(kwargs) or B.dim() != 3 or C.dim() != 3:
        return NotImplemented
    result: Any = ops.selective_scan(
        hidden_states.transpose(1, 2),
        dt.transpose(1, 2),
        A,
        B.transpose(1, 2),
        C.transpose(1, 2),
        D,
        None if z is None else z.transpose(1, 2),
        delta_bias,
        delta_softplus,
        output_final_state=return_last_state,
    )
    if return_last_state:
        out, final_state = result
        return out.transpose(1, 2), final_state
    return result.transpose(1, 2)


def mamba_inner_fn(*args: Any, **kwargs: Any) -> None:
    """None tells the model to go on with its conv and the scan above; so does the torch code of transformers.

    With mamba-ssm installed the original would swallow the whole mixer in one kernel that packc cannot pack, and that
    masks padding once where the unfused path masks it twice: only the latter is right for left padding.
    """
    return


def _all_none(kwargs: dict[str, Any]) -> bool:
    return all(value is None for value in kwargs.values())


KEPT_WHOLE: KeptWhole = {MODELING: {form.__name__: form for form in (mamba_selective_scan, mamba_inner_fn)}}
