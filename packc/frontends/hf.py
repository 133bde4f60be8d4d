"""What the modeling files of Hugging Face transformers (>= 5.15) share."""

from typing import Any

MODELING = "transformers.models.*.modeling_*"
"""The modules that define the functions; each has copies of its own."""

# What the kernels that may stand behind these functions make something of. Models hand down whatever they were called
# with (``output_router_logits``), and the torch code of transformers takes no notice of any of it.
_HEEDED = (
    "z",
    "seq_idx",
    "cu_seqlens",
    "state_v_first",
    "use_gate_in_kernel",
    "use_beta_sigmoid_in_kernel",
    "return_intermediate_states",
    "cp_context",
    "scale",
    "initial_states",
    "return_varlen_states",
    "return_final_states",
)


def heeded(kwargs: dict[str, Any]) -> bool:
    """Whether some of what the torch code ignores would count where kernels are installed."""
    return any(kwargs.get(name) is not None and kwargs[name] is not False for name in _HEEDED)
