"""What the modeling files of Hugging Face transformers (>= 5.15) share."""

from typing import Any

from packc.frontends.tracing_backend import called_with_boundaries

MODELING = "transformers.models.*.modeling_*"
"""The modules that define the functions; each has copies of its own."""

# What the kernels that may stand behind these functions make something of. Models hand down whatever they were called
# with (``output_router_logits``), and the torch code of transformers takes no notice of any of it.
_HEEDED = (
    "z",
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
# Of these the graph has inputs of its own, by which it is packed.
_BOUNDARIES = ("seq_idx", "cu_seqlens")


def heeded(kwargs: dict[str, Any]) -> bool:
    """Whether some of what the torch code ignores would count where kernels are installed."""
    if any(kwargs.get(name) is not None for name in _BOUNDARIES) and not called_with_boundaries():
        return True
    return any(kwargs.get(name) is not None and kwargs[name] is not False for name in _HEEDED)
