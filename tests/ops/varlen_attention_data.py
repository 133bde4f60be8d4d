"""Inputs of varlen_attention, runs of it, and the same from torch's own attention."""

from itertools import pairwise

import torch
import torch.nn.functional as F

from packc.ops import varlen_attention


def offsets(lengths, dtype=torch.int32):
    return torch.tensor([0, *lengths], dtype=dtype).cumsum(0, dtype=dtype)


def inputs(lengths, H=4, H_kv=2, K=16, V=None, dtype=torch.float32, device="cpu"):
    """q, k, v as leaves, and cu_seqlens."""
    torch.manual_seed(0)
    shapes = (H, K), (H_kv, K), (H_kv, V or K)
    leaves = [torch.randn(1, sum(lengths), *shape, dtype=torch.float64) for shape in shapes]
    return [leaf.to(device, dtype).requires_grad_() for leaf in leaves], offsets(lengths).to(device)


def with_grads(out, leaves):
    """out and the gradients of all leaves, for a random gradient of out."""
    torch.manual_seed(1)
    dout = torch.randn(out.shape, dtype=torch.float64, device="cpu").to(out.device, out.dtype)
    return [out, *torch.autograd.grad(out, leaves, dout)]


def run(leaves, cu_seqlens, **options):
    return with_grads(varlen_attention(*leaves, cu_seqlens=cu_seqlens, **options), leaves)


def exact(leaves, cu_seqlens, **options):
    """By the specification, in fp64."""
    return run([leaf.detach().double().requires_grad_() for leaf in leaves], cu_seqlens, **options)


def plain(leaves, cu_seqlens, causal=True, scale=None, window=None):
    """By torch's scaled_dot_product_attention with a mask, a document at a time."""
    q, k, v = (leaf.transpose(1, 2) for leaf in leaves)
    parts = []
    for begin, end in pairwise(cu_seqlens.tolist()):
        mask = torch.ones(end - begin, end - begin, dtype=torch.bool, device=q.device)
        mask = mask.tril() if causal else mask
        mask = mask if window is None else mask.triu(1 - window).tril(window - 1)
        part = (tensor[:, :, begin:end] for tensor in (q, k, v))
        if begin < end:
            parts.append(F.scaled_dot_product_attention(*part, attn_mask=mask, scale=scale, enable_gqa=True))
    return with_grads(torch.cat(parts, 2).transpose(1, 2), leaves)


def error(result, expected):
    """The largest one, relative to the largest entry if that is above 1."""
    if not result.numel():
        return 0.0
    return ((result.double() - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


def assert_as_exact_as_plain_torch(leaves, cu_seqlens, **options):
    results = run(leaves, cu_seqlens, **options)
    for mine, theirs, expected in zip(
        results, plain(leaves, cu_seqlens, **options), exact(leaves, cu_seqlens, **options), strict=True
    ):
        assert mine.dtype == theirs.dtype
        assert mine.shape == theirs.shape
        assert mine.is_contiguous()
        # A gradient that is zero because fp32 terms of about 10 cancel is as far off as these are rounded.
        slack = 5e-7 if mine.dtype == torch.float32 else 2e-6
        assert error(mine, expected) <= 2 * error(theirs, expected) + slack
