"""What ``ops.py`` times: per op, our calls, a baseline and the peers that can be imported.

The first contender of an op is its baseline. Beside the call stands the least that it must do: bytes to read and write,
each once, and exponentials. Inputs are random, of the shapes and memory layouts that models have.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import packc.ops as ops

MEAN_LENGTH, SHORTEST, LONGEST = 646, 57, 2048  # tokens of PackMamba's documents


class Contender(NamedTuple):
    run: Callable[[], object]
    bytes: float = 0
    exponentials: float = 0


class Problem(NamedTuple):
    tokens: int
    channels: int
    dtype: torch.dtype
    device: torch.device

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.device)

    @property
    def activation_bytes(self) -> int:
        return self.tokens * self.channels * self.dtype.itemsize

    def documents(self, shortest: int, longest: int, mean: float | None = None) -> Tensor:
        """cu_seqlens of random lengths: log-normal about a mean, or uniform; the last document is cut to fit."""
        generator = torch.Generator().manual_seed(0)
        count = self.tokens // shortest + 1
        if mean is None:
            lengths = torch.randint(shortest, longest + 1, (count,), generator=generator)
        else:
            lengths = torch.empty(count).log_normal_(0, 0.85, generator=generator)
            lengths = (lengths * mean / lengths.mean()).round().long().clamp(shortest, longest)
        ends = lengths.cumsum(0)
        bounds = torch.cat([torch.zeros(1, dtype=torch.long), ends[ends < self.tokens], torch.tensor([self.tokens])])
        return bounds.to(self.device, torch.int32)


def forward_backward(call: Callable[..., Tensor], *inputs: Tensor | None) -> Callable[[], object]:
    leaves = [x if x is None else x.detach().requires_grad_() for x in inputs]
    wanted = [x for x in leaves if x is not None]
    with torch.no_grad():
        dout = torch.randn_like(call(*leaves))
    return lambda: torch.autograd.grad(call(*leaves), wanted, dout)


def causal_conv1d(p: Problem) -> dict[str, Contender]:
    """W = 4 with bias and SiLU; the baseline copies the input into a tensor that exists already."""
    W, T, D = 4, p.tokens, p.channels
    x, out, weight, bias = p.random(1, T, D), p.random(1, T, D), p.random(D, W), p.random(D)
    projection, channel_first = p.random(1, T, 2 * D)[..., :D], p.random(1, D, T).transpose(1, 2)
    real, ones = p.documents(SHORTEST, LONGEST, MEAN_LENGTH), p.documents(1, 1)

    def conv(x: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        return ops.causal_conv1d(x, weight, bias, activation="silu", cu_seqlens=cu_seqlens)

    once, thrice = 2 * p.activation_bytes, 5 * p.activation_bytes
    found = {
        "copy_ of x": Contender(lambda: out.copy_(x), once),
        "forward": Contender(lambda: conv(x, weight, bias), once),
        "forward, rows of a projection": Contender(lambda: conv(projection, weight, bias), once),
        "forward, channel-first memory": Contender(lambda: conv(channel_first, weight, bias), once),
        "forward, documents": Contender(lambda: conv(x, weight, bias, real), once),
        "forward, documents of 1": Contender(lambda: conv(x, weight, bias, ones), once),
        # Of copies, that x may be as cold for the baseline as the others are.
        "forward + backward": Contender(forward_backward(conv, x.clone(), weight, bias), thrice),
        "forward + backward, documents": Contender(
            forward_backward(lambda *leaves: conv(*leaves, real), x.clone(), weight, bias), thrice
        ),
    }
    if dao := peer("causal_conv1d", p):

        def dao_conv(x, weight, bias):
            return dao.causal_conv1d_fn(x.transpose(1, 2), weight, bias, activation="silu")

        found["causal_conv1d, forward"] = Contender(lambda: dao_conv(x, weight, bias), once)
        found["causal_conv1d, forward + backward"] = Contender(forward_backward(dao_conv, x, weight, bias), thrice)
    if fla := peer("fla.modules.convolution", p):

        def fla_conv(x, weight, bias):
            return fla.causal_conv1d(x, weight, bias, activation="silu", cu_seqlens=real)[0]

        found["fla, forward, documents"] = Contender(lambda: fla_conv(x, weight, bias), once)
        found["fla, forward + backward, documents"] = Contender(forward_backward(fla_conv, x, weight, bias), thrice)
    return found


def selective_scan(p: Problem) -> dict[str, Contender]:
    """N = 16; the baseline is the exponential of a (T, D, N) tensor into one that exists already, on a GPU ``copy_``.

    As a model calls it: softplus, bias, skip connection and gate; delta in channel-first memory, the others slices of
    token-major projections.
    """
    N, rank, T, D = 16, 32, p.tokens, p.channels
    u, channel_first = p.random(1, T, D), p.random(1, D, T).transpose(1, 2)
    delta, z = p.random(1, T, D).abs_(), p.random(1, T, 2 * D)[..., D:]
    A = -torch.arange(1, N + 1, device=p.device).float().repeat(D, 1)
    B, C = p.random(1, T, rank + 2 * N)[..., rank:].chunk(2, -1)
    skip, bias = torch.ones(D, device=p.device), torch.randn(D, device=p.device) - 4
    bare, model = (u, delta, A, B.contiguous(), C.contiguous()), (u, channel_first, A, B, C, skip, z, bias)
    short, real = p.documents(1, 64), p.documents(SHORTEST, LONGEST, MEAN_LENGTH)

    def scan(*inputs: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        return ops.selective_scan(*inputs, delta_softplus=len(inputs) == len(model), cu_seqlens=cu_seqlens)

    def packed(cu_seqlens: Tensor) -> Callable[..., Tensor]:
        return lambda *inputs: scan(*inputs, cu_seqlens=cu_seqlens)

    # A step takes N exponentials a channel, softplus and gate one each; the backward takes all of them again.
    forward = {"bytes": 4 * p.activation_bytes, "exponentials": float(T) * D * (N + 2)}
    both = {"bytes": 11 * p.activation_bytes, "exponentials": 2.0 * T * D * (N + 2)}
    if p.device.type == "cpu":
        states, exponentials = p.random(T, D, N), p.random(T, D, N)
        found = {"exp of (T, D, N)": Contender(lambda: torch.exp(states, out=exponentials))}
    else:
        out = torch.empty_like(u)
        found = {"copy_ of u": Contender(lambda: out.copy_(u), 2 * p.activation_bytes)}
    found |= {
        "forward, bare": Contender(lambda: scan(*bare), 3 * p.activation_bytes, float(T) * D * N),
        "forward, as a model calls it": Contender(lambda: scan(*model), **forward),
        "forward, documents": Contender(lambda: scan(*model, cu_seqlens=real), **forward),
        "forward, documents of 1-64": Contender(lambda: scan(*model, cu_seqlens=short), **forward),
        "forward + backward, bare": Contender(forward_backward(scan, *bare), 8 * p.activation_bytes, 2.0 * T * D * N),
        "forward + backward, as a model": Contender(forward_backward(scan, *model), **both),
        "forward + backward, documents": Contender(forward_backward(packed(real), *model), **both),
        "forward + backward, docs of 1-64": Contender(forward_backward(packed(short), *model), **both),
    }
    if p.device.type == "cuda":
        from packc.ops.selective_scan import triton_forward

        def one_segment(*inputs: Tensor) -> Tensor:
            with mock.patch.object(triton_forward, "segment_tokens", lambda rows, tokens, *_: -(-tokens // 64) * 64):
                return scan(*inputs, cu_seqlens=real)

        found["forward, documents, not parallel over T"] = Contender(lambda: one_segment(*model), **forward)
        both_alone = forward_backward(one_segment, *model)
        found["forward + backward, documents, not parallel over T"] = Contender(both_alone, **both)
    if mamba := peer("mamba_ssm.ops.selective_scan_interface", p):

        def mamba_scan(u, delta, A, B, C, D, z, bias):
            u, delta, B, C, z = (x.transpose(1, 2) for x in (u, delta, B, C, z))
            return mamba.selective_scan_fn(u, delta, A, B, C, D, z, bias, delta_softplus=True)

        found["mamba_ssm, forward, as a model"] = Contender(lambda: mamba_scan(*model), **forward)
        found["mamba_ssm, forward + backward, as a model"] = Contender(forward_backward(mamba_scan, *model), **both)
    return found


def pack(p: Problem) -> dict[str, Contender]:
    """Rows padded to their longest, on the right; the baseline copies the packed tokens, the peer is index_select."""
    starts = p.documents(SHORTEST, LONGEST, MEAN_LENGTH).long()
    lengths = starts.diff()
    rows, length = len(lengths), int(lengths.max())
    mask = torch.arange(length, device=p.device) < lengths[:, None]
    index, _ = ops.packing_index(mask)
    x, tokens = p.random(rows, length, p.channels), p.random(1, p.tokens, p.channels)
    out = torch.empty_like(tokens)
    gathered, scattered = 2 * p.activation_bytes, p.activation_bytes + x.numel() * p.dtype.itemsize

    def there(x: Tensor) -> Tensor:
        return ops.pack(x, index)

    def back(x: Tensor) -> Tensor:
        return ops.unpack(x, index, rows, length)

    def selected(x: Tensor) -> Tensor:
        return x.flatten(0, 1).index_select(0, index)

    return {
        "copy_ of the tokens": Contender(lambda: out.copy_(tokens), gathered),
        "pack": Contender(lambda: there(x), gathered),
        "unpack": Contender(lambda: back(tokens), scattered),
        "packing_index": Contender(lambda: ops.packing_index(mask)),
        "pack, forward + backward": Contender(forward_backward(there, x), gathered + scattered),
        "unpack, forward + backward": Contender(forward_backward(back, tokens), gathered + scattered),
        "index_select, forward": Contender(lambda: selected(x), gathered),
        "index_select, forward + backward": Contender(forward_backward(selected, x), gathered + scattered),
    }


def varlen_attention(p: Problem) -> dict[str, Contender]:
    """Causal, heads of 64; the baseline is torch's SDPA on rows padded to their longest, with a mask per key."""
    K, T = 64, p.tokens
    H = max(p.channels // K, 1)
    q, k, v = (p.random(1, T, H, K) for _ in range(3))
    documents = p.documents(SHORTEST, LONGEST, MEAN_LENGTH) if T > LONGEST else p.documents(SHORTEST, 200)
    lengths = documents.long().diff()
    rows, length = len(lengths), int(lengths.max())
    index, _ = ops.packing_index(torch.arange(length, device=p.device) < lengths[:, None])
    padded = [ops.unpack(x, index, rows, length).transpose(1, 2).contiguous() for x in (q, k, v)]
    seen = torch.ones(length, length, dtype=torch.bool, device=p.device).tril()
    seen = seen & (torch.arange(length, device=p.device) < lengths[:, None, None, None])
    seen = seen | torch.eye(length, dtype=torch.bool, device=p.device)  # a row of padding sees itself: no NaN

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    def varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.varlen_attention(q, k, v, cu_seqlens=documents)

    return {
        "padded SDPA, forward": Contender(lambda: sdpa(*padded)),
        "forward": Contender(lambda: varlen(q, k, v)),
        "padded SDPA, forward + backward": Contender(forward_backward(sdpa, *padded)),
        "forward + backward": Contender(forward_backward(varlen, q, k, v)),
    }


def peer(module: str, p: Problem) -> Any:
    """The module where it is installed and there is a GPU for it, else None."""
    if p.device.type != "cuda":
        return None
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


SECTIONS: dict[str, Callable[[Problem], dict[str, Contender]]] = {
    "causal_conv1d": causal_conv1d,
    "selective_scan": selective_scan,
    "pack": pack,
    "varlen_attention": varlen_attention,
}
