"""``packc::varlen_attention`` and its backward: schema, implementations, fakes, FLOPs, autograd.

The op keeps its inputs, ``out``, and the log of each softmax's denominator, ``logsumexp (H, T)`` in fp32 (fp64 for fp64
inputs): from that the backward finds the probabilities again, tile by tile.
"""

from typing import Any

import torch
from torch import Tensor

from packc.ops import derivatives, dispatch
from packc.ops.flops import flop_formula
from packc.ops.mixer import OldMixer
from packc.ops.varlen_attention import cpu, cuda, reference

_IMPLEMENTATIONS: dict[str, Any] = {"reference": reference, "cpu": cpu, "triton": cuda}

_library = torch.library.Library("packc", "FRAGMENT")
# Strides are read in place where that can be (layout.py), and those of the results do not depend on them. On CUDA the
# longest document is read on the host, which no CUDA graph can hold.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout, torch.Tag.cudagraph_unsafe)
_library.define(
    "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, bool causal, float? scale, int? window) "
    "-> (Tensor out, Tensor logsumexp)",
    tags=_TAGS,
)
_library.define(
    "varlen_attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor logsumexp, Tensor cu_seqlens, "
    "bool causal, float? scale, int? window) -> (Tensor dq, Tensor dk, Tensor dv)",
    tags=_TAGS,
)
OldMixer("varlen_attention", per_token=("q", "k", "v"))


def choose(q: Tensor) -> str:
    """``"reference"``, ``"cpu"`` (torch's CPU flash attention) or ``"triton"`` (flash or Flex on CUDA), as for all ops.

    There is no kernel of ours: the names are those of ``packc.config.kernels``, by device.
    """
    wanted = dispatch.wanted_kernels()
    if wanted == "reference" or q.dtype == torch.float64:
        return "reference"
    by_device = {"cpu": "cpu", "cuda": "triton"}.get(q.device.type, "reference")
    if wanted in ("auto", by_device):
        return by_device
    raise ValueError(f'packc.config.kernels = "{wanted}": varlen_attention got a {q.dtype} tensor on {q.device}')


def _forward(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _IMPLEMENTATIONS[choose(q)].varlen_attention(q, *args)


def _backward(dout: Tensor, q: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _IMPLEMENTATIONS[choose(q)].varlen_attention_bwd(dout, q, *args)


for _device in ("CPU", "CUDA"):
    _library.impl("varlen_attention", _forward, _device)
    _library.impl("varlen_attention_bwd", _backward, _device)


@torch.library.register_fake("packc::varlen_attention", lib=_library)
def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool, scale: float | None, window: int | None
) -> tuple[Tensor, Tensor]:
    _, T, H, _ = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((1, T, H, v.shape[3])), q.new_empty((H, T), dtype=dtype)


@torch.library.register_fake("packc::varlen_attention_bwd", lib=_library)
def _backward_fake(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


# Where documents end is data, which formulas do not see: they count one document of T tokens, an upper bound.


def _pairs(T: int, causal: bool, window: int | None) -> int:
    """Of a query and a key that it sees, in one document."""
    if not causal:
        return T * T
    seen = T if window is None else torch.sym_min(T, window)
    return T * seen - seen * (seen - 1) // 2


@flop_formula(torch.ops.packc.varlen_attention)
def _forward_flops(
    q_shape: tuple[int, ...],
    k_shape: Any,
    v_shape: tuple[int, ...],
    cu_seqlens_shape: Any,
    causal: bool,
    scale: Any,
    window: int | None,
    *_: Any,
    **__: Any,
) -> int:
    T, H, K = q_shape[1:]
    return 2 * H * _pairs(T, causal, window) * (K + v_shape[3])


@flop_formula(torch.ops.packc.varlen_attention_bwd)
def _backward_flops(
    dout_shape: Any,
    q_shape: tuple[int, ...],
    k_shape: Any,
    v_shape: tuple[int, ...],
    saved_out_shape: Any,
    logsumexp_shape: Any,
    cu_seqlens_shape: Any,
    causal: bool,
    scale: Any,
    window: int | None,
    *_: Any,
    **__: Any,
) -> int:
    T, H, K = q_shape[1:]
    # The scores once more, and the gradients of the probabilities, of q, of k and of v.
    return 2 * H * _pairs(T, causal, window) * (3 * K + 2 * v_shape[3])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.causal, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, cu_seqlens, out, logsumexp = ctx.saved_tensors
    grads = torch.ops.packc.varlen_attention_bwd.default(
        dout, q, k, v, out, logsumexp, cu_seqlens, ctx.causal, ctx.scale, ctx.window
    )
    return (*grads, None, None, None, None)


derivatives.register(_library, "varlen_attention", _forward, _setup_context, _differentiate)
derivatives.register_gradients(_library, "varlen_attention_bwd", _backward)
