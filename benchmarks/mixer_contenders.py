"""What ``ops.py`` times of the chunked mixers: beside torch.mm, a copy, transformers' torch paths and GPU peers.

Heads have 64 channels, and 128 where said. Decays, steps and gates are drawn so that states neither vanish nor grow.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from op_contenders import LONGEST, MEAN_LENGTH, SHORTEST, Contender, Problem, forward_backward, peer
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import packc.ops as ops

HEAD = 64  # channels


def mm_for(p: Problem, call: Callable[[], object]) -> Contender:
    """A product of large matrices with as many FLOPs as the chunked algorithm of a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    inner = 1024
    rows = max(counter.get_total_flops() // (2 * inner * inner), 1)
    left, right, out = p.random(rows, inner), p.random(inner, inner), p.random(rows, inner)
    return Contender(lambda: torch.mm(left, right, out=out))


def linear_attention(p: Problem) -> dict[str, Contender]:
    """A decay per token and head; as many heads of queries as of values."""
    H, T = max(p.channels // HEAD, 1), p.tokens
    q, k, v = (p.random(1, T, H, HEAD) for _ in range(3))
    g = -torch.rand(1, T, H, device=p.device) * 0.1
    short, real = p.documents(1, 64), p.documents(SHORTEST, LONGEST, MEAN_LENGTH)

    def attend(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return ops.linear_attention(q, k, v, g)

    def packed(cu_seqlens: Tensor) -> Callable[..., Tensor]:
        return lambda q, k, v, g: ops.linear_attention(q, k, v, g, cu_seqlens=cu_seqlens)

    found = {
        "mm of the forward's FLOPs": mm_for(p, lambda: attend(q, k, v, g)),
        "forward": Contender(lambda: attend(q, k, v, g)),
        "forward, no decay": Contender(lambda: ops.linear_attention(q, k, v)),
        "forward, documents": Contender(lambda: packed(real)(q, k, v, g)),
        "forward, documents of 1-64": Contender(lambda: packed(short)(q, k, v, g)),
        "forward + backward": Contender(forward_backward(attend, q, k, v, g)),
        "forward + backward, documents": Contender(forward_backward(packed(real), q, k, v, g)),
        "forward + backward, docs of 1-64": Contender(forward_backward(packed(short), q, k, v, g)),
    }
    if fla := peer("fla.ops.simple_gla", p):
        for name, documents in (("", None), (", documents", real)):

            def simple_gla(q, k, v, g, documents=documents):
                return fla.chunk_simple_gla(q, k, v, g, cu_seqlens=documents)[0]

            found[f"fla, forward{name}"] = Contender(lambda call=simple_gla: call(q, k, v, g))
            found[f"fla, forward + backward{name}"] = Contender(forward_backward(simple_gla, q, k, v, g))
    return found


def ssd(p: Problem) -> dict[str, Contender]:
    """As Mamba-2 calls it, with one group of B and C for all heads, and with one for each."""
    H, T = max(p.channels // HEAD, 1), p.tokens
    x, dt = p.random(1, T, H, HEAD), p.random(1, T, H)
    A, D, bias = (f(H, device=p.device) for f in (lambda *s, **o: -torch.rand(*s, **o), torch.ones, torch.randn))
    bias = bias - 4
    one, own = ((x, dt, A, p.random(1, T, G, HEAD), p.random(1, T, G, HEAD), D, bias) for G in (1, H))
    short, real = p.documents(1, 64), p.documents(SHORTEST, LONGEST, MEAN_LENGTH)

    def packed(cu_seqlens: Tensor | None) -> Callable[..., Tensor]:
        def scan(x, dt, A, B, C, D, bias):
            return ops.ssd(x, dt, A, B, C, D, dt_bias=bias, dt_softplus=True, cu_seqlens=cu_seqlens)

        return scan

    scan = packed(None)
    found = {
        "mm of the forward's FLOPs": mm_for(p, lambda: scan(*one)),
        "forward": Contender(lambda: scan(*one)),
        "forward, documents": Contender(lambda: packed(real)(*one)),
        "forward, documents of 1-64": Contender(lambda: packed(short)(*one)),
        "forward + backward": Contender(forward_backward(scan, *one)),
        "forward + backward, documents": Contender(forward_backward(packed(real), *one)),
        "forward + backward, docs of 1-64": Contender(forward_backward(packed(short), *one)),
        "forward + backward, a group a head": Contender(forward_backward(scan, *own)),
    }
    if p.device.type == "cpu":
        from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

        def transformers(x, dt, A, B, C, D, bias):
            out = mamba2_chunk_scan(x, dt, A, B, C, 256, D=D, dt_bias=bias, dt_softplus=True)
            return out[0] if isinstance(out, tuple) else out

        found["transformers, forward + backward"] = Contender(forward_backward(transformers, *one))
        found["transformers, a group a head"] = Contender(forward_backward(transformers, *own))
    if mamba := peer("mamba_ssm.ops.triton.ssd_combined", p):
        for name, documents in (("", None), (", documents", real)):
            index = None if documents is None else document_of_token(documents)

            def combined(x, dt, A, B, C, D, bias, index=index):
                return mamba.mamba_chunk_scan_combined(
                    x, dt, A, B, C, 256, D=D, dt_bias=bias, dt_softplus=True, seq_idx=index
                )

            found[f"mamba_ssm, forward{name}"] = Contender(lambda call=combined: call(*one))
            found[f"mamba_ssm, forward + backward{name}"] = Contender(forward_backward(combined, *one))
    return found


def document_of_token(cu_seqlens: Tensor) -> Tensor:
    lengths = cu_seqlens.diff().long()
    return torch.arange(len(lengths), device=lengths.device, dtype=torch.int32).repeat_interleave(lengths)[None]


def gated_delta_rule(p: Problem) -> dict[str, Contender]:
    """A training step; with the keys normalised before, as models do it."""
    T, H = p.tokens, max(p.channels // HEAD, 1)

    def inputs(K: int) -> tuple[Tensor, ...]:
        k, g = F.normalize(p.random(1, T, H, K), dim=-1), F.logsigmoid(p.random(1, T, H).float() + 2)
        return p.random(1, T, H, K), k, p.random(1, T, H, K), g, torch.rand_like(g)

    narrow, wide = inputs(HEAD), inputs(2 * HEAD)
    channels = (*narrow[:3], F.logsigmoid(p.random(1, T, H, HEAD).float() + 2), narrow[4])
    short, real = p.documents(1, 64), p.documents(SHORTEST, LONGEST, MEAN_LENGTH)

    def packed(cu_seqlens: Tensor | None) -> Callable[..., Tensor]:
        return lambda *leaves: ops.gated_delta_rule(*leaves, cu_seqlens=cu_seqlens)

    found = {
        "forward": Contender(lambda: packed(None)(*narrow)),
        "forward + backward": Contender(forward_backward(packed(None), *narrow)),
        "forward + backward, documents": Contender(forward_backward(packed(real), *narrow)),
        "forward + backward, docs of 1-64": Contender(forward_backward(packed(short), *narrow)),
        "forward + backward, heads of 128": Contender(forward_backward(packed(None), *wide)),
        "forward + backward, a decay a channel": Contender(forward_backward(packed(None), *channels)),
    }
    if p.device.type == "cpu":
        from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

        def transformers(*leaves: Tensor) -> Tensor:
            out = torch_chunk_gated_delta_rule(*leaves)
            return out[0] if isinstance(out, tuple) else out

        found["transformers, forward + backward"] = Contender(forward_backward(transformers, *narrow))
        found["transformers, heads of 128"] = Contender(forward_backward(transformers, *wide))
    if fla := peer("fla.ops.gated_delta_rule", p):
        for name, documents in (("", None), (", documents", real)):

            def chunk_rule(*leaves, documents=documents):
                return fla.chunk_gated_delta_rule(*leaves, cu_seqlens=documents)[0]

            found[f"fla, forward{name}"] = Contender(lambda call=chunk_rule: call(*narrow))
            found[f"fla, forward + backward{name}"] = Contender(forward_backward(chunk_rule, *narrow))
            found[f"fla, forward + backward, heads of 128{name}"] = Contender(forward_backward(chunk_rule, *wide))
    return found


def linear_scan(p: Problem) -> dict[str, Contender]:
    """The baseline adds two tensors into a third: what a scan must at least read and write."""
    T, D = p.tokens, p.channels
    a, b, out = torch.sigmoid(p.random(1, T, D) + 2), p.random(1, T, D), p.random(1, T, D)
    channel_first = tuple(x.mT.contiguous().mT for x in (a, b))
    short, real = p.documents(1, 64), p.documents(SHORTEST, LONGEST, MEAN_LENGTH)

    def packed(cu_seqlens: Tensor | None) -> Callable[..., Tensor]:
        return lambda a, b: ops.linear_scan(a, b, cu_seqlens=cu_seqlens)

    once, thrice = 3 * p.activation_bytes, 8 * p.activation_bytes
    return {
        "add into a tensor": Contender(lambda: torch.add(a, b, out=out), once),
        "forward": Contender(lambda: packed(None)(a, b), once),
        "forward, documents": Contender(lambda: packed(real)(a, b), once),
        "forward, documents of 1-64": Contender(lambda: packed(short)(a, b), once),
        "forward, channel-first memory": Contender(lambda: packed(None)(*channel_first), once),
        "forward + backward": Contender(forward_backward(packed(None), a, b), thrice),
        "forward + backward, documents": Contender(forward_backward(packed(real), a, b), thrice),
        "forward + backward, docs of 1-64": Contender(forward_backward(packed(short), a, b), thrice),
    }


SECTIONS: dict[str, Callable[[Problem], dict[str, Contender]]] = {
    "linear_attention": linear_attention,
    "ssd": ssd,
    "gated_delta_rule": gated_delta_rule,
    "linear_scan": linear_scan,
}
