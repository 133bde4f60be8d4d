"""The signature of a package that needs a GPU, closed to the compiler as its function is."""

import torch


@torch.compiler.disable
def chunk_kda(
    q,
    k,
    v,
    g,
    beta,
    scale=None,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=False,
    use_gate_in_kernel=False,
    safe_gate=False,
    lower_bound=None,
    cu_seqlens=None,
    **kwargs,
):
    raise NotImplementedError("needs a GPU")
