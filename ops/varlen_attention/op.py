"""``packc::varlen_attention`` and its backward.

The op keeps its inputs, ``out``, and the log of each softmax's denominator, ``logsumexp (H, T)`` in fp32 (fp64 for fp64
inputs): from that the backward finds the probabilities again, tile by tile. What is dropped of them is a function of
``seed``, an int64 number on the CPU, which is wanted where ``dropout_p`` is not 0: the op itself draws nothing. A sink
is part of the denominator, and so of ``logsumexp``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from packc.ops import dispatch, documents
from packc.ops.mixer import Example, Mixer
from packc.ops.registration import declare
from packc.ops.shapes import FLOATING, Groups
from packc.ops.varlen_attention import cpu, cuda, reference

_IMPLEMENTATIONS: dict[str, Any] = {"reference": reference, "cpu": cpu, "triton": cuda}


def check_tensors(op: str, tensors: Mapping[str, Any], cu_seqlens: Tensor, cu_seqlens_k: Tensor | None = None) -> None:
    """
    Args:
        cu_seqlens_k: of keys that are not as many as queries.

    Raises:
        TypeError, ValueError: a dtype or a shape does not fit.
    """
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    sinks, bias = tensors["sinks"], tensors["relative_bias"]

    def refused(x: Tensor, expected: str, error: type[Exception] = ValueError) -> Exception:
        return error(f"{op}: {expected}; got {tuple(x.shape)} of {x.dtype}")

    if q.ndim != 4 or q.dtype not in FLOATING:
        raise refused(q, "q must be (1, T, H, K) and floating", ValueError if q.dtype in FLOATING else TypeError)
    documents.check_cu_seqlens(cu_seqlens, q, "q")
    _, T, H, K = q.shape
    if H < 1 or K < 1:
        raise refused(q, "q must have H >= 1 and K >= 1")
    keys = "T_k" if cu_seqlens_k is not None else T
    same = (0, 3) if cu_seqlens_k is not None else (0, 1, 3)
    if k.ndim != 4 or any(documents.differ(k.shape[i], q.shape[i]) for i in same) or k.shape[2] < 1:
        raise refused(k, f"k must be (1, T, H_kv, K) = (1, {keys}, H_kv, {K})")
    if cu_seqlens_k is not None:
        documents.check_cu_seqlens(cu_seqlens_k, k, "k", "cu_seqlens_k")
        if documents.differ(cu_seqlens_k.shape[0], cu_seqlens.shape[0]):
            shapes = tuple(cu_seqlens.shape), tuple(cu_seqlens_k.shape)
            raise ValueError("{}: cu_seqlens_k must be as long as cu_seqlens {}; got {}".format(op, *shapes))
    H_kv = k.shape[2]
    if H % H_kv:
        raise refused(k, f"q's {H} heads must be a multiple of k's H_kv")
    if v.ndim != 4 or any(documents.differ(v.shape[i], k.shape[i]) for i in (0, 1, 2)) or v.shape[3] < 1:
        raise refused(v, f"v must be (1, T, H_kv, V) = (1, {k.shape[1]}, {H_kv}, V)")
    for name in ("k", "v"):
        if tensors[name].dtype != q.dtype:
            raise refused(tensors[name], f"{name} must be of q's dtype {q.dtype}", TypeError)
        if tensors[name].device != q.device:
            raise ValueError(f"{op}: {name} is on {tensors[name].device}, q on {q.device}")
    if sinks is not None and (
        sinks.ndim not in (1, 3)
        or any(documents.differ(a, b) for a, b in zip(reversed(sinks.shape), (H, T, 1)))  # noqa: B905  of one axis, or all
        or not sinks.is_floating_point()
    ):
        raise refused(sinks, f"sinks must be (H,) = ({H},) or (1, T, H) = (1, {T}, {H}), and floating")
    if bias is not None and (
        bias.ndim != 4
        or any(documents.differ(bias.shape[i], q.shape[i]) for i in (0, 1, 2))
        or bias.shape[3] < 1
        or not bias.is_floating_point()
    ):
        raise refused(bias, f"relative_bias must be (1, T, H, R) = (1, {T}, {H}, R) and floating")
    for name in ("sinks", "relative_bias"):
        if tensors[name] is not None and tensors[name].device != q.device:
            raise ValueError(f"{op}: {name} is on {tensors[name].device}, q on {q.device}")


def choose(op: str, q: Tensor) -> str:
    """``"reference"``, ``"cpu"`` (C++) or ``"triton"``: flash or Flex on CUDA, which are not ours, nor want Triton."""
    wanted, exact = dispatch.wanted_kernels(), q.dtype == torch.float64
    if q.is_cuda and not exact and wanted in ("auto", "triton"):
        return "triton"
    if wanted == "triton" and not exact:
        raise ValueError(f'packc.config.kernels = "triton": {op} got a {q.dtype} tensor on {q.device}')
    return dispatch.choose(op, q)


# Where documents end is data, which formulas do not see: they count one document of T tokens, an upper bound.


def pairs_before(T: int, window: int | None) -> int:
    """Of T tokens, each with itself and those before it."""
    seen = T if window is None else torch.sym_min(T, window)
    return T * seen - seen * (seen - 1) // 2


def _pairs(T: int, causal: bool, window: int | None) -> int:
    """Of a query and a key that it sees, in one document."""
    before = pairs_before(T, window)
    return before if causal else 2 * before - T


def _flops(L: int, H: int, K: int, V: int, causal: bool, window: int | None, **_: Any) -> int:
    return 2 * H * _pairs(L, causal, window) * (K + V)


def _backward_flops(L: int, H: int, K: int, V: int, causal: bool, window: int | None, **_: Any) -> int:
    """The scores once more, and the gradients of the probabilities, of q, of k and of v."""
    return 2 * H * _pairs(L, causal, window) * (3 * K + 2 * V)


MIXER = declare(
    Mixer(
        "varlen_attention",
        tensors={
            "q": "B L H K",
            "k": "B L G K",
            "v": "B L G V",
            "sinks?": "H | B L H",
            "relative_bias?": "B L H R",
        },
        like="q",
        options={
            "causal": "bool",
            "scale": "float?",
            "window": "int?",
            "dropout_p": "float",
            "seed": "Tensor?",
            "softcap": "float?",
        },
        out="B L H V",
        keeps={"out": "B L H V", "logsumexp": "H L"},
        groups=Groups("G", "H", "q's {H} heads must be a multiple of k's {G}"),
        check=check_tensors,
        in_state_dtype=("sinks",),
        implementations=_IMPLEMENTATIONS,
        choose=choose,
        forward=lambda kernels, *args: kernels.varlen_attention(*args),
        backward=lambda kernels, *args: kernels.varlen_attention_bwd(*args),
        example=Example({"H": 2, "G": 1, "K": 3, "V": 4}, without=("relative_bias",)),
        flops=_flops,
        backward_flops=_backward_flops,
        # Strides are read in place where that can be (layout.py), and those of the results do not depend on them. On
        # CUDA the longest document is read on the host, which no CUDA graph can hold.
        tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout, torch.Tag.cudagraph_unsafe),
    )
)
