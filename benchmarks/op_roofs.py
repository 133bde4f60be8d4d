"""What a GPU can do at most, measured: bytes moved and exponentials taken, per second."""

import torch
import triton
import triton.language as tl
from triton.testing import do_bench

BYTES = 2**31  # far beyond any cache
STEPS, BLOCK = 4096, 1024


def bytes_per_second() -> float:
    """Of a copy, reads and writes."""
    x = torch.empty(BYTES // 2, dtype=torch.uint8, device="cuda")
    out = torch.empty_like(x)
    return BYTES / (do_bench(lambda: out.copy_(x), return_mode="min") * 1e-3)


def exponentials_per_second() -> float:
    """Of a kernel that only takes them, in fp32, many at once in every thread."""
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    out = torch.empty(BLOCK, device="cuda")
    grid = (processors * 8,)
    seconds = do_bench(lambda: _exponentials[grid](out, STEPS, BLOCK, num_warps=8), return_mode="min") * 1e-3
    return grid[0] * STEPS * BLOCK / seconds


@triton.jit
def _exponentials(out, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = at.to(tl.float32) / -BLOCK
    for _ in range(STEPS):
        x = tl.exp2(-x)
    tl.store(out + at, x)
